"""The exllamav2 backend where there is neither a GPU nor the library: a stand-in has its modules, on some devices."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from commands import contents

from kd.cli import main
from kd.config import Teacher
from kd.errors import UserError
from kd.models.settings import read_settings
from kd.teacher import backends
from kd.teacher.backends.placement import GIB, Forward, Part, place, spread

STORE = Path("artifacts/mini/teacher/base")
LAYERS = 6  # and so twelve modules
HIDDEN = 16


class Module:
    """One that adds its number to whatever it is given, in place, as the library's do."""

    def __init__(self, number: int) -> None:
        self.number, self.idx, self.loaded = number, 99, False

    def numel(self) -> int:
        return 1000

    def scratch_space_fixed(self) -> int:
        return 64

    def set_device_idx(self, idx: int) -> None:
        self.idx = idx

    def device(self) -> str:
        return "cpu"

    def load(self) -> None:
        self.loaded = True

    def forward(self, states: torch.Tensor, **_: Any) -> torch.Tensor:
        assert self.loaded
        states += self.number
        return states


class Embedding(Module):
    def forward(self, ids: torch.Tensor, **_: Any) -> torch.Tensor:
        assert self.loaded
        return ids[..., None].half() + torch.arange(HIDDEN).half()


class Library(ModuleType):
    """What the backend asks of exllamav2; `made` is the model that it made last."""

    def __init__(self) -> None:
        super().__init__("exllamav2")
        self.made: Any = None
        self.cleaned = 0

    def ExLlamaV2Config(self, folder: str) -> Any:  # noqa: N802  (the library's own name)
        settings = {"hidden_size": 32, "intermediate_size": 64, "max_dq_size": 1, "vocab_size": 400, "norm_eps": 1e-6}
        return SimpleNamespace(folder=folder, max_seq_len=2048, **settings)

    def ExLlamaV2(self, settings: Any) -> Any:  # noqa: N802
        last = 2 * LAYERS + 2
        norm, head = Module(0), Module(0)
        norm.weight = torch.nn.Parameter(torch.ones(32).half())  # type: ignore[attr-defined]
        head.get_weight_tensor_dq = lambda: torch.ones(32, 416)  # type: ignore[attr-defined]
        modules = [Embedding(0), *(Module(number) for number in range(1, last - 1)), norm, head]
        made = SimpleNamespace(config=settings, modules=modules, head_layer_idx=last, scratch=None)
        made.create_device_tensors = lambda sizes: setattr(made, "scratch", sizes)
        self.made = made
        return made


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    """The stand-in, in the library's place, and three GPUs that are none."""
    found = Library()
    attn, tensors = ModuleType("exllamav2.attn"), ModuleType("exllamav2.fasttensors")
    attn.ExLlamaV2Attention = SimpleNamespace(Params=lambda *_: None)  # type: ignore[attr-defined]
    tensors.cleanup_stfiles = lambda: setattr(found, "cleaned", found.cleaned + 1)  # type: ignore[attr-defined]
    for module in (found, attn, tensors):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    cuda = {
        "is_available": lambda: True,
        "device_count": lambda: 3,
        "device": lambda _: nullcontext(),
        "mem_get_info": lambda _: (10 * GIB, 80 * GIB),
        "memory_allocated": lambda _: GIB,
        "empty_cache": lambda: None,
        "current_stream": lambda: SimpleNamespace(synchronize=lambda: None),
        "get_device_name": lambda: "a stand-in",
        "get_device_properties": lambda _: SimpleNamespace(name="a stand-in", total_memory=80 * GIB, major=9, minor=0),
    }
    for name, stand_in in cuda.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return found


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("stage")]


@pytest.fixture
def ready(
    library: Library, tiny_params: dict[str, Any], write_params: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Params of a capture with three questions a forward, and all that it needs."""
    del library
    tiny_params["teacher"] |= {"backend": "exllamav2", "dtype": "float16", "batch_rows": 3}
    tiny_params["dataset"]["train_rows"] = 40
    write_params(tiny_params)
    assert main(["prepare"]) == 0
    assert main(["head"]) == 0
    return tiny_params


def loaded(folder: Path, longest: int = 100, batch_rows: int = 1) -> backends.LoadedTeacher:
    model = {"source": "folder", "path": str(folder)}
    document = {"backend": "exllamav2", "model": model, "dtype": "float16", "batch_rows": batch_rows}
    return backends.load(Teacher.model_validate(document), longest)


def test_states_are_those_of_all_layers_one_after_another(library: Library, tiny_llama: Path) -> None:
    batches = [[[7, 8, 9], [3]], [[5]], [[1, 2], [4, 4], [6]]]
    found = list(loaded(tiny_llama, batch_rows=3).states(iter(batches)))
    assert [[len(row) for row in batch] for batch in found] == [[3, 1], [1], [2, 2, 1]]
    added = sum(range(1, 2 * LAYERS + 1))
    for states, batch in zip(found, batches, strict=True):
        for row, ids in zip(states, batch, strict=True):
            expected = torch.tensor(ids)[:, None] + torch.arange(HIDDEN) + added
            assert torch.equal(row, expected.half())
    assert [module.idx for module in library.made.modules] == [-1, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 99, 99]
    assert [module.loaded for module in library.made.modules] == [True] * 13 + [
        False
    ] * 2  # norm and head are not asked
    assert library.made.scratch == [64] * 3
    assert library.cleaned == 1


def test_what_each_gpu_holds_is_said_in_one_line(
    library: Library, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del library
    loaded(tiny_llama)
    assert (
        "teacher: GPU 0 holds 1.0 GiB and has 10.0 left, GPU 1 holds 1.0 GiB and has 10.0 left, "
        "GPU 2 holds 1.0 GiB and has 10.0 left\n"
    ) in capsys.readouterr().err


def test_more_gpus_than_modules_leave_some_without(
    library: Library, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 20)
    assert len(list(loaded(tiny_llama).states([[[1]], [[2]]]))) == 2
    assert [module.idx for module in library.made.modules[1:13]] == list(range(12))


def test_the_head_is_loaded_alone(ready: dict[str, Any], library: Library) -> None:
    del ready
    assert [module.loaded for module in library.made.modules] == [False] * 13 + [True] * 2


@pytest.mark.usefixtures("ready")
def test_any_number_of_gpus_gives_the_same_store(monkeypatch: pytest.MonkeyPatch) -> None:
    stores = []
    for gpus in (1, 2, 4):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert main(["teacher", "base"]) == 0
        stores.append(contents(STORE))
        STORE.rename(f"{gpus}")
    assert stores[0] == stores[1] == stores[2]


@pytest.mark.usefixtures("ready")
@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered"), 1, "illegal memory access"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_a_stage_that_fails_ends_all_and_the_same_command_goes_on(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    said: str,
) -> None:
    assert main(["teacher", "base"]) == 0
    whole = contents(STORE)
    STORE.rename("whole")
    forward, calls = Module.forward, iter(range(10**6))

    def failing(self: Module, states: torch.Tensor, **more: Any) -> torch.Tensor:
        if self.number == 7 and next(calls) == 9:  # of the second GPU; six batches make a shard
            raise error
        return forward(self, states, **more)

    monkeypatch.setattr(Module, "forward", failing)
    assert main(["teacher", "base"]) == status
    last = capsys.readouterr().err.splitlines()[-1]
    assert said in last
    assert "1 of 3 shards are kept in artifacts/mini/teacher/.partial/base/" in last
    assert main(["teacher", "base"]) == 0
    assert contents(STORE) == whole


def test_what_does_not_fit_is_refused_before_it_is_loaded(
    ready: dict[str, Any],
    write_params: Callable[[dict[str, Any]], None],
    library: Library,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (round(0.76 * GIB), GIB))
    ready["teacher"]["batch_rows"] = 4000
    write_params(ready)
    assert main(["head"]) == 0
    assert main(["teacher", "base"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "kd: teacher: 3 GPUs need 1." in error
    assert "0.8, 0.8, 0.8 GiB free; set `teacher.batch_rows` to " in error
    assert not library.made.modules[1].loaded
    ready["teacher"]["batch_rows"] = int(error.rpartition(" to ")[2])
    write_params(ready)
    assert main(["head"]) == 0
    assert main(["teacher", "base"]) == 0


def test_a_question_longer_than_the_model_reads_is_refused(library: Library, tiny_llama: Path) -> None:
    del library
    with pytest.raises(UserError, match="reads 2048 tokens, and a question has 2049"):
        loaded(tiny_llama, longest=2049)


def parts(*weights: int) -> list[Part]:
    return [Part(count, 10 * count) for count in weights]


@pytest.mark.parametrize(
    ("weights", "rooms", "counts"),
    [
        ((1, 1, 1, 1), (100, 100), [2, 2]),
        ((1, 1, 1, 1, 1), (100, 100), [3, 2]),
        ((1, 5, 1, 5, 1, 5, 1, 5), (1000, 1000, 1000, 1000), [2, 2, 2, 2]),
        ((1, 1, 1, 1), (10, 100), [1, 3]),  # the first has less room
        ((1, 1, 1, 1), (100, -5, 20), [2, 0, 2]),  # another program has all of the second's
        ((1, 1, 1, 1), (20, 10), None),
        ((5,), (49, 49, 49), None),
        ((5,), (50, 50), [1, 0]),
    ],
)
def test_the_split_is_even_by_time_as_far_as_there_is_room(
    weights: tuple[int, ...], rooms: tuple[int, ...], counts: list[int] | None
) -> None:
    assert spread(parts(*weights), rooms) == counts


def test_the_refusal_names_what_would_fit(tiny_llama: Path) -> None:
    layers = [Part(GIB, GIB) for _ in range(12)]
    forward = Forward(read_settings(tiny_llama), quantized=True, rows=1, tokens=64)
    with pytest.raises(UserError, match=r"^teacher: 2 GPUs need 6\.8 GiB each .* 5\.0, 5\.0 GiB free; take 3 GPUs "):
        place(layers, [5 * GIB, 5 * GIB], forward)
    assert place(layers, [5 * GIB] * 3, forward) == [4, 4, 4]
    with pytest.raises(UserError, match=r"1\.0 GiB free; take GPUs with more memory, or a smaller teacher$"):
        place(layers, [GIB], forward)
