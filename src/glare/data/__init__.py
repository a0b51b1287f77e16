"""Images and masks: folders, the Hub, parquet and tar shards, and the procedural landcover scenes."""
