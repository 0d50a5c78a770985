"""One worker of two, each with a GPU: sums by copies against sums in float64; prints "right" when all of them are.

python -m tests.apps.training.workers.peer_sums RANK PORT
"""

import os
import sys
from itertools import product

import torch
import torch.distributed as dist

from apps.training.workers.launch import Launch, own_gpu
from apps.training.workers.peer_copies import PeerCopies, peers_in_reach
from apps.training.workers.reducer import GradientReducer
from compiled.reduction import addend

SHAPES = [{"a": (300, 70), "b": (5,)}, {"c": (1000, 33)}, {"d": ()}, {"e": (64, 64), "f": (7, 3)}, {}, {"g": (129,)}]
KINDS = [(torch.bfloat16, None), (torch.float32, None), (torch.bfloat16, torch.float32), (torch.float64, None)]


def gradients(step: int, rank: int, dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
    """What a worker has in a step; the other one can make them too."""
    make = torch.Generator().manual_seed(100 * step + rank)
    return [{name: torch.randn(shape, generator=make).to(dtype) for name, shape in each.items()} for each in SHAPES]


def summed(
    reducer: GradientReducer, mine: list[dict[str, torch.Tensor]], pairs: bool, seen: list[int]
) -> dict[int, dict[str, torch.Tensor]]:
    found = {}
    for group in reversed(range(len(SHAPES))):
        reducer.start(group, dict(mine[group]))
        for number, parts in reducer.finished(everything=group == 0, pairs=pairs):
            names = [name for name in parts if not name.startswith(addend(""))]
            # two of one dtype come as they are, to be added in at least float32, unless their place was needed
            assert len(parts) == len(names) or (pairs and reducer.dtype in (None, next(iter(parts.values())).dtype))
            seen.extend([number] if len(parts) > len(names) else [])
            found[number] = {name: at_least_float32(parts[name]) for name in names}
            for name in names if len(parts) > len(names) else ():
                found[number][name] = found[number][name] + at_least_float32(parts[addend(name)])
    return found


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def check(found: dict[int, dict[str, torch.Tensor]], step: int, dtype: torch.dtype, reducer: GradientReducer) -> None:
    both = [gradients(step, rank, dtype) for rank in range(2)]
    for group, names in enumerate(SHAPES):
        if not reducer.owns(group):
            assert found[group] == {}, (group, found[group])
            continue
        for name in names:
            exact = both[0][group][name].double() + both[1][group][name].double()
            ours = found[group][name]
            assert ours.dtype == torch.promote_types(dtype, torch.float32)
            assert torch.equal(ours.cpu(), exact.to(ours.dtype)), (step, group, name)  # two terms: rounded once


def main() -> None:
    rank, port = int(sys.argv[1]), int(sys.argv[2])
    own_gpu(Launch(rank=rank, world_size=2, local_rank=rank, local_world_size=2))
    assert os.environ["CUDA_VISIBLE_DEVICES"].count(",") == 1
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0)
    dist.init_process_group("nccl", store=store, rank=rank, world_size=2, device_id=device)
    assert peers_in_reach(2, 2)
    for shards in (False, True):
        copies = PeerCopies(dist.group.WORLD, rank=rank, world_size=2)
        for (dtype, wire), pairs in product(KINDS, (False, True)):
            reducer = GradientReducer(
                dist.group.WORLD,
                rank=rank,
                world_size=2,
                shards=shards,
                dtype=wire,
                bucket_bytes=20_000,
                copies=copies,
            )
            reducer.assign([sum(torch.Size(shape).numel() for shape in each.values()) for each in SHAPES])
            reducer.bucket_bytes = 20_000
            for step in range(3):
                mine = [{name: one.to(device) for name, one in each.items()} for each in gradients(step, rank, dtype)]
                seen: list[int] = []
                check(summed(reducer, mine, pairs, seen), step, dtype, reducer)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                found = summed(reducer, mine, pairs, seen)
            assert bool(seen) == (pairs and wire in (None, dtype))
            for step in range(3, 8):
                for each, new in zip(mine, gradients(step, rank, dtype), strict=True):
                    for name, tensor in each.items():
                        tensor.copy_(new[name])
                graph.replay()
                check(found, step, dtype, reducer)
    dist.barrier()
    print("right", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
