"""ViTs as their repositories write and compute them: random state dicts with their keys, and literal forward passes."""

import torch
from torch import Tensor
from torch.nn.functional import conv2d, gelu, layer_norm, silu

WIDTH, DEPTH, HEADS, PATCH, GRID = 128, 2, 2, 4, 4
SIZE = PATCH * GRID
SWIGLU = 344  # 4 * 128 * 2 / 3, rounded up to a multiple of 8
State = dict[str, Tensor]


def random_like(shapes: dict[str, tuple[int, ...]], *, seed: int = 0) -> State:
    """Values large enough that a wrong one shows; weights of norms and layer scales around 1."""
    generator = torch.Generator().manual_seed(seed)
    near_one = ("norm", "norm1", "norm2", "ls1", "ls2")
    return {
        name: torch.randn(shape, generator=generator) * 0.2
        + float(name.endswith((".weight", ".gamma")) and name.split(".")[-2] in near_one)
        for name, shape in shapes.items()
    }


def block_shapes(*, mlp: str = "fc", layer_scale: bool = False) -> dict[str, tuple[int, ...]]:
    d, h = WIDTH, 4 * WIDTH
    shapes: dict[str, tuple[int, ...]] = {
        "norm1.weight": (d,),
        "norm1.bias": (d,),
        "attn.qkv.weight": (3 * d, d),
        "attn.qkv.bias": (3 * d,),
        "attn.proj.weight": (d, d),
        "attn.proj.bias": (d,),
        "norm2.weight": (d,),
        "norm2.bias": (d,),
    }
    if layer_scale:
        shapes |= {"ls1.gamma": (d,), "ls2.gamma": (d,)}
    first, last, rows, hidden = {
        "fc": ("fc1", "fc2", h, h),
        "dinov2-swiglu": ("w12", "w3", 2 * SWIGLU, SWIGLU),
        "timm-swiglu": ("fc1", "fc2", 2 * SWIGLU, SWIGLU),
    }[mlp]
    return shapes | {
        f"mlp.{first}.weight": (rows, d),
        f"mlp.{first}.bias": (rows,),
        f"mlp.{last}.weight": (d, hidden),
        f"mlp.{last}.bias": (d,),
    }


def vit(
    tokens: dict[str, tuple[int, ...]], *, positions: int, mlp: str = "fc", layer_scale: bool = False, seed: int = 0
) -> State:
    """A ViT with ``tokens`` before its patches, ``positions`` of which are in the table of positions."""
    shapes: dict[str, tuple[int, ...]] = {
        **tokens,
        "pos_embed": (1, positions + GRID**2, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (WIDTH,),
    }
    block = block_shapes(mlp=mlp, layer_scale=layer_scale)
    shapes |= {f"blocks.{i}.{name}": shape for i in range(DEPTH) for name, shape in block.items()}
    return random_like(shapes | {"norm.weight": (WIDTH,), "norm.bias": (WIDTH,)}, seed=seed)


def class_token(count: int = 1) -> dict[str, tuple[int, ...]]:
    return {"cls_token": (1, count, WIDTH)}


def udi_attention(seed: int = 1) -> State:
    """UDI's region attention and the norm before it, as they stand beside the ViT in its wrapper."""
    d = WIDTH
    return random_like(
        {
            "attn.qkv.weight": (3 * d, d),
            "attn.qkv.bias": (3 * d,),
            "attn.proj.weight": (d, d),
            "attn.proj.bias": (d,),
            "attn.norm.weight": (d,),
            "attn.norm.bias": (d,),
            "norm1.weight": (d,),
            "norm1.bias": (d,),
        },
        seed=seed,
    )


def head(*, copies: int | None = None) -> State:
    """DINO's projection head, or UDI's list of ``copies`` of it."""
    shapes: dict[str, tuple[int, ...]] = {"last_layer.weight_g": (16, 1), "last_layer.weight_v": (16, 8)}
    for layer, (rows, columns) in {0: (12, WIDTH), 2: (12, 12), 4: (8, 12)}.items():
        shapes |= {f"mlp.{layer}.weight": (rows, columns), f"mlp.{layer}.bias": (rows,)}
    prefixes = ["head."] if copies is None else [f"head.{i}." for i in range(copies)]
    return {prefix + name: tensor for prefix in prefixes for name, tensor in random_like(shapes).items()}


def under(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def patches(state: State, images: Tensor) -> Tensor:
    """(b, 3, h, w) -> (b, n, d)."""
    x = conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=_patch(state))
    return x.flatten(2).transpose(1, 2)


def _patch(state: State) -> int:
    return state["patch_embed.proj.weight"].shape[-1]


def dino(state: State, images: Tensor, *, heads: int = HEADS) -> Tensor:
    """DINO, iBOT, UDI: class tokens before the patches, then a position for each."""
    x = patches(state, images)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], dim=1) + state["pos_embed"]
    return encode(state, x, heads)


def flsl(state: State, images: Tensor) -> Tensor:
    """Patches alone."""
    return encode(state, patches(state, images) + state["pos_embed"], HEADS)


def dinov2(state: State, images: Tensor) -> Tensor:
    """Positions before registers come in, between class token and patches."""
    x = patches(state, images)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], dim=1) + state["pos_embed"]
    if "register_tokens" in state:
        x = torch.cat([x[:, :1], state["register_tokens"].expand(len(x), -1, -1), x[:, 1:]], dim=1)
    return encode(state, x, HEADS)


def timm(state: State, images: Tensor) -> Tensor:
    """Class, distillation and register tokens in this order; positions for all, or for patches alone."""
    x = patches(state, images)
    names = [name for name in ("cls_token", "dist_token", "reg_token") if name in state]
    prefix = [state[name].expand(len(x), -1, -1) for name in names]
    if state["pos_embed"].shape[1] == x.shape[1]:
        x = torch.cat([*prefix, x + state["pos_embed"]], dim=1)
    else:
        x = torch.cat([*prefix, x], dim=1) + state["pos_embed"]
    return encode(state, x, HEADS)


def encode(state: State, x: Tensor, heads: int) -> Tensor:
    for i in range(1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))):
        own = {name.removeprefix(f"blocks.{i}."): value for name, value in state.items() if f"blocks.{i}." in name}
        x = x + own.get("ls1.gamma", 1) * attention(own, "attn.", norm(own, "norm1", x), heads)
        x = x + own.get("ls2.gamma", 1) * mlp(own, norm(own, "norm2", x))
    return norm(state, "norm", x)


def norm(state: State, name: str, x: Tensor) -> Tensor:
    return layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)


def linear(state: State, name: str, x: Tensor) -> Tensor:
    y = x @ state[f"{name}.weight"].T
    return y + state[f"{name}.bias"] if f"{name}.bias" in state else y


def attention(state: State, prefix: str, x: Tensor, heads: int) -> Tensor:
    b, n, d = x.shape
    q, k, v = linear(state, f"{prefix}qkv", x).reshape(b, n, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) * (d // heads) ** -0.5).softmax(dim=-1)
    return linear(state, f"{prefix}proj", (weights @ v).transpose(1, 2).reshape(b, n, d))


def mlp(state: State, x: Tensor) -> Tensor:
    if "mlp.w12.weight" in state:
        first, second = linear(state, "mlp.w12", x).chunk(2, dim=-1)
        return linear(state, "mlp.w3", silu(first) * second)
    hidden = linear(state, "mlp.fc1", x)
    if hidden.shape[-1] == 2 * state["mlp.fc2.weight"].shape[1]:
        first, second = hidden.chunk(2, dim=-1)
        return linear(state, "mlp.fc2", silu(first) * second)
    return linear(state, "mlp.fc2", gelu(hidden))


def region_attention(state: State, x: Tensor) -> Tensor:
    """UDI's, of every patch: norm, attention, the normed input added, norm."""
    x = norm(state, "norm1", x)
    return norm(state, "attn.norm", attention(state, "attn.", x, HEADS) + x)
