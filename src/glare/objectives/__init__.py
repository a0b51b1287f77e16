"""What is learned from views: one file an objective, each opening with its equations."""
