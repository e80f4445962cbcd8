"""Tensor parallelism of transformers: a process has some heads of each layer, and their gates with them.

``from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2))`` shares out the projections of queries, keys
and values as the plan of a model's configuration says. KA-attention is computed head by head, so it needs nothing but
the gates of a process's own heads: the styles below, which `with_gates` adds to the plan.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from torch import nn

from ka_attention.hf.config import KAConfig
from ka_attention.hf.heads import Heads
from ka_attention.hf.layer import Layer

ATTENTION, GATE = "ka_attention", "ka_gate"


def with_gates(plan: dict[str, str] | None, config: Any) -> dict[str, str] | None:
    """The tensor-parallel ``plan`` of a decoder with the configuration ``config``, and what KA-attention adds to it."""
    projections = (
        key for key, style in (plan or {}).items() if style == "colwise" and ("attn" in key or "attention" in key)
    )
    attention = next(projections, "").rpartition(".")[0]
    if plan is None or not attention:  # its heads stay together
        return plan
    ka, added = KAConfig.of(config), {attention: ATTENTION}
    if ka.gate != "fixed":
        added[f"{attention}.ka_gate"] = GATE
    if ka.output_gate:
        added[f"{attention}.ka_output_gate"] = "colwise"
    return plan | added


@cache
def register_styles() -> None:
    """Make the styles known to transformers. A PyTorch built without collectives has none."""
    from torch.distributed import is_available

    if not is_available():
        return
    from torch.distributed.tensor import Shard, distribute_tensor
    from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer

    class GateOfHeads(TensorParallelLayer):
        """Every parameter begins with a dimension of query heads, and its own process's part of it is computed with."""

        def should_use_local_tensors(self, module: nn.Module) -> bool:
            return True

        def shard_param(self, module: nn.Module, param: str, mesh: Any) -> None:
            whole = module._parameters[param]
            assert whole is not None
            shared = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)
            module._parameters[param] = nn.Parameter(shared, requires_grad=whole.requires_grad)

    class AttentionOfHeads(TensorParallelLayer):
        """Fixed gates that differ by head are shared out; what cannot be is refused."""

        def install_forward(self, module: Any, mesh: Any) -> Any:
            module.ka_layer = layer_of_heads(Layer.of(module), module.config, mesh.get_local_rank(), mesh.size())
            return module

    styles: Any = ALL_PARALLEL_STYLES
    styles.register(GATE, GateOfHeads())
    styles.register(ATTENTION, AttentionOfHeads())


def layer_of_heads(layer: Layer, config: Any, rank: int, size: int) -> Layer:
    """``layer`` with the gates of one of ``size`` processes. ValueError for heads that cannot be shared out."""
    heads = Heads.of(config)
    if heads.query % size or heads.key % size:
        raise ValueError(f"tp_size: {heads.query} query and {heads.key} key heads must be multiples of {size}")
    if layer.has_adapter:
        raise ValueError("tp_size: layers with adapters keep their heads together")
    if layer.ka.convolution is not None:
        raise ValueError("tp_size: layers with a convolution keep their heads together")
    if not isinstance(layer.gate, tuple):
        return layer
    own = heads.query // size
    return replace(layer, gate=layer.gate[rank * own : (rank + 1) * own], _gates={})
