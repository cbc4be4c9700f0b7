"""What a decoder's rotary embeddings do with positions: how queries and keys turn, and what its key
biases become by them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hkvprof.errors import HkvWarning, ModelError
from hkvprof.models.adapter import ModelView
from hkvprof.models.calls import cache_keyword
from hkvprof.models.decoder_input import mixed
from hkvprof.models.weights import gathered
from hkvprof.models.wrappers import unwrap
from hkvprof.selection.rotary import Positions, RotatingKeys, Turning

CHANGING = ("dynamic", "longrope")
"""Kinds of rotary embeddings whose frequencies depend on a prompt's length."""
TOLERANCE = 0.03
"""By how much the keys of zeros may miss the rotated bias, as a share of it: bfloat16 rounds."""
PROBES = (1, 7, 40)
"""Positions at which the rotation is tried, on each axis in another order."""


def rotary_module(model: Any, view: ModelView) -> nn.Module | None:
    """The decoder's module of rotary embeddings, called once per pass; None where there is none."""
    names = {module: name for name, module in unwrap(model).named_modules()}
    above = names.get(view.attention[0], "")
    while "." in above:
        above = above.rpartition(".")[0]
        found = getattr(unwrap(model).get_submodule(above), "rotary_emb", None)
        if isinstance(found, nn.Module):
            return found
    return None


@contextmanager
def watching_positions(
    model: Any, view: ModelView, see: Callable[[Tensor, int], None]
) -> Iterator[None]:
    """Within: `see(positions [axes, 1 or rows, tokens], rows)` before the layers of every pass.

    Raises ModelError where the model has no rotary embeddings that could be asked.
    """
    rotary = rotary_module(model, view)
    if rotary is None:
        raise ModelError(
            f"{view.fingerprint.architecture}: the profile goes by the positions of tokens (an "
            "index of keys with biases, or calibrated scores), and this model has no module "
            "`rotary_emb` that is told them: calibrate it with this hkvprof"
        )

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["x"]
        ids = args[1] if len(args) > 1 else kwargs["position_ids"]
        see(ids.reshape(-1, *ids.shape[-2:]), len(hidden))

    hook = rotary.register_forward_pre_hook(torch.compiler.disable(before), with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def rotating_keys(model: Any, view: ModelView) -> RotatingKeys | None:
    """What the model's key biases become by its rotary embeddings; None where it has none.

    Both are tried out: attention of zeros stores keys that are nothing but the rotated bias. Where
    those are others than expected, warns (HkvWarning) and gives None.
    """
    biases = [view.adapter.key_bias(module) for module in view.attention]
    held = [bias for bias in biases if bias is not None]
    if len(held) < len(biases) or not any(bool(bias.any()) for bias in held):
        return None
    rotary, kind = rotary_module(model, view), _kind(view)
    if rotary is None or kind in CHANGING:
        _warn(f"its rotary embeddings ({kind}) have no frequencies that always hold")
        return None
    bias = torch.stack([bias.float().cpu() for bias in held]).unflatten(1, (view.grid.kv_heads, -1))
    frequency, axis, scale = _turning(rotary, view, held[0].device)
    turning = 2 * len(frequency)
    bias[..., turning:] = 0
    keys = RotatingKeys((bias * scale).numpy(), frequency.numpy(), axis.to(torch.uint8).numpy())
    off = max(_missed(model, view, layer, keys) for layer in range(len(held)))
    if off > TOLERANCE:
        _warn(f"its keys miss the rotated bias by {off:.0%}")
        return None
    return keys


@torch.no_grad()
def turning(model: Any, view: ModelView) -> Turning | None:
    """How the model's rotary embeddings turn queries and keys.

    Tried out in every covered layer: attention of the same states at several positions stores keys
    that are those at position 0, turned. Where they are others than expected, warns (HkvWarning)
    and gives None.
    """
    rotary, kind = rotary_module(model, view), _kind(view)
    if rotary is None or kind in CHANGING:
        _leave_out(f"its rotary embeddings ({kind}) have no frequencies that always hold")
        return None
    try:
        device = _device(view.attention[0])
        frequency, axis, _ = _turning(rotary, view, device)
        found = Turning(frequency.numpy(), axis.to(torch.uint8).numpy())
        off = max(_untrue(model, view, layer, found) for layer in range(len(view.attention)))
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        _leave_out(f"its rotary embeddings cannot be tried out ({error})")
        return None
    if off > TOLERANCE:
        _leave_out(f"its keys miss the expected rotation by {off:.0%}")
        return None
    return found


def _device(module: nn.Module) -> torch.device:
    """Where a module computes; packed weights are buffers."""
    return next(chain(module.parameters(), module.buffers())).device


def _leave_out(reason: str) -> None:
    warnings.warn(
        f"static heads of this model are scored by the prompt's last rows alone, since {reason}: "
        "scores by the calibration's own queries are left out of the profile",
        HkvWarning,
        stacklevel=4,
    )


def _warn(reason: str) -> None:
    warnings.warn(
        f"the index takes the bias of this model's keys for a constant, since {reason}: it finds "
        "less than it could",
        HkvWarning,
        stacklevel=4,
    )


def _parameters(view: ModelView) -> dict[str, Any]:
    """How the covered layers' embeddings rotate; some models have other rules for other layers."""
    found = getattr(view.text_config, "rope_parameters", None) or {}
    return found.get(_layer_type(view), found)


def _layer_type(view: ModelView) -> str:
    kinds = getattr(view.text_config, "layer_types", None)
    return kinds[view.layer_ids[0]] if kinds else ""


def _kind(view: ModelView) -> str:
    return str(_parameters(view).get("rope_type"))


def _axes(view: ModelView) -> int:
    return 3 if "mrope_section" in _parameters(view) else 1


def _rotation(rotary: nn.Module, view: ModelView, states: Tensor, ids: Tensor) -> Any:
    """Cosine and sine of the covered layers, as the model makes them."""
    asked = "layer_type" in inspect.signature(rotary.forward).parameters
    return rotary(states, ids, *([_layer_type(view)] if asked else []))


def _turning(
    rotary: nn.Module, view: ModelView, device: torch.device
) -> tuple[Float[Tensor, " pairs"], Tensor, float]:
    """Radians per position and axis of every pair, and the factor that cosine and sine have."""
    axes = _axes(view)
    steps = torch.eye(axes, dtype=torch.int64, device=device)[:, None]  # [axes, 1, axes]
    cosine, sine = _angles(rotary, view, steps if axes > 1 else steps[0])
    angle = torch.atan2(sine, cosine)[:, : cosine.shape[1] // 2]
    frequency, axis = angle.max(dim=0)
    exact = getattr(rotary, "inv_freq", None)
    if exact is not None and exact.shape == frequency.shape:
        exact = exact.float().cpu()
        frequency = exact if torch.allclose(exact, frequency, rtol=1e-4, atol=0) else frequency
    return frequency, axis, float(torch.hypot(cosine, sine).mean())


def _angles(rotary: nn.Module, view: ModelView, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine [tokens, width] on the host, float32."""
    probe = torch.zeros(1, 1, 1, device=positions.device)
    made = _rotation(rotary, view, probe, positions)
    cosine, sine = (mixed(part, view.text_config) for part in made)
    return cosine.float().cpu(), sine.float().cpu()


def _missed(model: Any, view: ModelView, layer: int, keys: RotatingKeys) -> float:
    """How far the keys that attention makes of zeros are from the rotated bias, as a share."""
    told = _probes(view)
    attention: Any = view.attention[layer]
    bias = view.adapter.key_bias(attention)  # also where weights are packed and no parameters
    assert bias is not None
    made = _keys_of(model, view, layer, bias.new_zeros(view.text_config.hidden_size), told)
    worst = 0.0
    for head, own in enumerate(keys.heads(layer, torch.device("cpu"))):
        left = own.removed(made[head], Positions(0, told.shape[1], told.int()))
        turning = 2 * len(keys.frequency)
        size = made[head][:, :turning].norm()
        worst = max(worst, float(left[:, :turning].norm() / size.clamp(min=1e-6)))
    return worst


def _untrue(model: Any, view: ModelView, layer: int, found: Turning) -> float:
    """How far keys that attention makes of the same state are from the turned first, as a share."""
    told = torch.cat([torch.zeros(_axes(view), 1, dtype=torch.int64), _probes(view)], dim=1)
    weight = view.output_projection(layer)
    state = torch.randn(view.text_config.hidden_size, generator=torch.Generator().manual_seed(0))
    made = _keys_of(model, view, layer, state.to(weight.device, weight.dtype), told)
    back = found.undone(made, Positions(0, told.shape[1], told.int()))
    off, size = (back - made[:, :1]).norm(dim=-1), made[:, :1].norm(dim=-1)
    return float((off / size.clamp(min=1e-6)).max())


def _probes(view: ModelView) -> Tensor:
    """Positions [axes, PROBES], on each axis in another order."""
    axes, count = _axes(view), len(PROBES)
    return torch.tensor(
        [[PROBES[(i + axis) % count] for i in range(count)] for axis in range(axes)]
    )


def _keys_of(model: Any, view: ModelView, layer: int, state: Tensor, positions: Tensor) -> Tensor:
    """[kv_heads, tokens, dim] on the host: what a layer's attention stores of tokens that all have
    this hidden state."""
    from transformers.cache_utils import DynamicCache

    attention: Any = view.attention[layer]
    ids = positions.to(state.device)[:, None]
    states = state.expand(1, positions.shape[1], -1).clone()
    rotary = rotary_module(model, view)
    assert rotary is not None
    pair = _rotation(rotary, view, states, ids if len(ids) > 1 else ids[0])
    cache = DynamicCache(config=view.text_config)
    names = {"layer_past"} & inspect.signature(attention.forward).parameters.keys()
    kept = dict.fromkeys(names or {cache_keyword(attention.forward)}, cache)
    with gathered(model, attention):
        attention(hidden_states=states, position_embeddings=pair, attention_mask=None, **kept)
    keys = cache.layers[attention.layer_idx].keys
    if keys is None:
        raise ValueError("a layer's attention stores no keys where it is called by itself")
    return keys[0].float().cpu()
