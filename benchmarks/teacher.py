"""Questions per second, memory and exactness of the teacher's capture, beside the notebook's own loop.

    python benchmarks/teacher.py [--exl2 FOLDER]     on a GPU with exllamav2; writes benchmarks/results/teacher.json
    python benchmarks/teacher.py --transformers      on a GPU with transformers, bfloat16; teacher-transformers.json
    python benchmarks/teacher.py --tiny              the same steps on a CPU, with transformers; writes nothing

The model is a random Llama of 1B shape with a vocabulary of 128256, made on the spot; `--exl2` adds the exactness of a
quantized one. The notebook's loop (llama-3.1-405b-6bpw/inference_gsm8k.ipynb) is written anew: a forward with all
logits, `gc.collect`, `empty_cache`, the logits to the CPU and into a list. Ours is the whole way to a finished store on
disk. Both read questions of the same lengths in the same run, in turns; medians count. With transformers, each round of
one question a forward starts without a CUDA graph, and one way goes without them.
"""

from __future__ import annotations

import argparse
import gc
import random
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from result import write_result

from kd.config import FolderModel, Teacher
from kd.data.miniature import problems
from kd.distill.objective import reverse_kl
from kd.io.progress import progress
from kd.machine.stand_in import save_tokenizer
from kd.models.load import encode, load_model, load_tokenizer
from kd.paper import PROMPTS
from kd.store.head import HEAD_FOLDER, TeacherHead, read_head_manifest, write_head
from kd.store.reader import TeacherStore
from kd.store.records import Prompt, Reading, Tokenization
from kd.store.writer import StoreWriter
from kd.teacher import backends
from kd.teacher.backends import transformers as transformers_backend
from kd.teacher.capture import fill

ROUNDS = 5
TEMPERATURE = 5.942267335064758
ABOUT = (Prompt(name="base", text=""), Tokenization(bos=False, vocabulary_sha256=""))
GIB = 2**30


@dataclass(frozen=True)
class Size:
    """What is measured: a model's shape, and how many questions each way reads a round."""

    llama: dict[str, int]
    batch_rows: int
    notebook: int
    single: int
    batched: int
    wide_hidden: int  # of the head whose product is timed: the 405B teacher's


FULL = Size(
    {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    batch_rows=32,
    notebook=24,
    single=512,
    batched=2638,
    wide_hidden=16384,
)
TINY = Size(
    {
        "vocab_size": 500,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    batch_rows=8,
    notebook=8,
    single=40,
    batched=80,
    wide_hidden=256,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU: does the script work?")
    parser.add_argument("--transformers", action="store_true", help="the transformers backend, one question a forward")
    parser.add_argument("--exl2", type=Path, help="a quantized model whose exactness is measured as well")
    options = parser.parse_args()
    size = TINY if options.tiny else FULL
    backend = "transformers" if options.tiny or options.transformers else "exllamav2"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_llama(folder / "llama", size)
        loaded = load(folder / "llama", backend, size)
        questions = make_questions(size.batched, size.llama["vocab_size"])
        if options.transformers:
            one_by_one(loaded, questions, size, folder)
            return
        measured: dict[str, Any] = {"host memory during capture": host_memory(loaded, questions, folder)}
        measured |= compare_speed(every_way(loaded, questions, size, folder), questions)
        measured["exactness"] = {"unquantized": exactness(loaded, questions, folder)}
        measured["rebuilding"] = rebuilding(size)
        if options.exl2:
            loaded = load(options.exl2, backend, size)
            measured["exactness"]["quantized"] = exactness(loaded, read_problems(options.exl2), folder)
    medians = {name: way["questions_per_s"]["median"] for name, way in measured["ways"].items()}
    figures = {
        "speedup_single": medians["one question a forward"] / medians["notebook's loop"],
        "speedup_batched": medians["batches"] / medians["notebook's loop"],
        "bytes_per_token": measured["ways"]["one question a forward"]["bytes_per_token"],
        "hidden_size": float(size.llama["hidden_size"]),
    }
    if options.tiny:
        print(measured, figures, sep="\n")
    else:
        write_result("teacher", figures, measured)


def one_by_one(loaded: Loaded, questions: list[Reading], size: Size, folder: Path) -> None:
    """With transformers: the notebook's loop, and one question a forward with CUDA graphs and without."""

    some = questions[: 4 * size.notebook]

    def anew(use: bool) -> int:
        loaded.ours._one_by_one = (
            transformers_backend.ByLength(loaded.ours._run) if use and device() == "cuda" else None
        )
        return capture(loaded, questions if use else some, 1, folder / "single")

    graphs, launched = "one question a forward", "one question a forward, launched"
    ways: Ways = {
        "notebook's loop": (size.notebook, lambda: notebook_loop(loaded, questions[: size.notebook])),
        launched: (len(some), lambda: anew(False)),
        graphs: (len(questions), lambda: anew(True)),
    }
    measured = compare_speed(ways, questions)
    measured["graphs"] = graphs_of(loaded, questions)
    rates = {name: way["questions_per_s"]["median"] for name, way in measured["ways"].items()}
    figures = {
        "speedup_single": rates[graphs] / rates["notebook's loop"],
        "speedup_launched": rates[launched] / rates["notebook's loop"],
    }
    for name, way in measured["ways"].items():
        print(f"{name}: {way['questions_per_s']['median']:.1f} questions/s, {way['device_gib']:.2f} GiB more")
    print(measured["graphs"])
    write_result("teacher-transformers", figures, measured)


def graphs_of(loaded: Loaded, questions: list[Reading]) -> dict[str, Any]:
    """What one graph for each length takes, and whether its states are those of the launched forward, bit for bit."""
    by_length = {len(question.token_ids): question.token_ids for question in questions}
    loaded.ours._one_by_one = transformers_backend.ByLength(loaded.ours._run)
    launched = {length: loaded.ours.forward([token_ids])[0] for length, token_ids in by_length.items()}
    synchronize()
    free, start = torch.cuda.mem_get_info()[0], time.perf_counter()
    recorded = {length: loaded.ours.forward([token_ids])[0] for length, token_ids in by_length.items()}
    synchronize()
    taken, used = time.perf_counter() - start, free - torch.cuda.mem_get_info()[0]
    replayed = {length: loaded.ours.forward([token_ids])[0] for length, token_ids in by_length.items()}
    return {
        "lengths": len(by_length),
        "ms to record and replay": taken / len(by_length) * 1e3,
        "MiB each": used / len(by_length) / 2**20,
        "ms to replay": seconds_each(lambda: loaded.ours.forward([questions[0].token_ids])) * 1e3,
        "equal bit for bit": all(
            torch.equal(states, found[length]) for length, states in launched.items() for found in (recorded, replayed)
        ),
    }


def make_llama(folder: Path, size: Size) -> None:
    """A Llama with random float16 weights and a tokenizer that no one asks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    more = {
        "max_position_embeddings": 2048,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    config = LlamaConfig(**size.llama, **more)
    with torch.device(device()):
        model = LlamaForCausalLM(config).half()
    model.save_pretrained(folder)
    save_tokenizer(folder, size.llama["vocab_size"])


def make_questions(count: int, vocabulary: int) -> list[Reading]:
    """Random token ids, as long as GSM8K's questions are: 60 on average, few below 20 or above 150."""
    chance = random.Random(0)
    lengths = [min(max(int(chance.lognormvariate(4.0, 0.4)), 12), 250) for _ in range(count)]
    return [
        Reading(f"train-{i:05d}", [chance.randrange(vocabulary) for _ in range(length)], (0, length))
        for i, length in enumerate(lengths, start=1)
    ]


def read_problems(folder: Path) -> list[Reading]:
    """The miniature's problems, primed as the teacher prompt does or bare in turns, in a model's own tokens."""
    tokenizer = load_tokenizer(folder)
    texts = [PROMPTS[("base", "teacher")[i % 2]] + problem.question for i, problem in enumerate(problems(64, seed=1))]
    ids = [encode(tokenizer, text, bos=False) for text in texts]
    return [Reading(f"train-{i:05d}", found, (0, len(found))) for i, found in enumerate(ids, start=1)]


class Loaded(NamedTuple):
    """A teacher as this package loads it, and its library's own model."""

    teacher: Teacher
    ours: Any
    own: Any


def load(folder: Path, backend: Any, size: Size) -> Loaded:
    teacher = Teacher(
        backend=backend,
        model=FolderModel(source="folder", path=str(folder)),
        dtype="float16" if backend == "exllamav2" else "bfloat16" if device() == "cuda" else "float32",
        batch_rows=size.batch_rows,
    )
    if backend == "transformers":
        own = load_model(folder, teacher.dtype, device())
    else:
        own = autosplit(folder, size.batch_rows, 256)
    return Loaded(teacher, backends.load(teacher, longest=256), own)


def autosplit(folder: Path, rows: int, tokens: int) -> Any:
    """exllamav2's model, loaded as the notebook does it, for forwards of so many questions of so many tokens."""
    import exllamav2

    settings = exllamav2.ExLlamaV2Config(str(folder))
    settings.max_batch_size, settings.max_input_len = rows, tokens
    # As this package sets it: layers larger than that add in another order each time.
    settings.max_dq_size = max(settings.max_dq_size, settings.hidden_size * settings.intermediate_size)
    model = exllamav2.ExLlamaV2(settings)
    model.load_autosplit(exllamav2.ExLlamaV2Cache_Q6(model, max_seq_len=tokens, lazy=True))
    return model


Ways = dict[str, tuple[int, Callable[[], int]]]  # how many questions, and what reads them and returns bytes


def every_way(loaded: Loaded, questions: list[Reading], size: Size, folder: Path) -> Ways:
    """The notebook's loop, one question a forward, and batches."""
    single, batches = size.single, size.batch_rows
    return {
        "notebook's loop": (size.notebook, lambda: notebook_loop(loaded, questions[: size.notebook])),
        "one question a forward": (single, lambda: capture(loaded, questions[:single], 1, folder / "single")),
        "batches": (size.batched, lambda: capture(loaded, questions, batches, folder / "batched")),
    }


def compare_speed(ways: Ways, questions: list[Reading]) -> dict[str, Any]:
    """Rounds of each way, in turns."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for number in range(ROUNDS + 1):  # the first warms up
        for name, (count, way) in ways.items():
            with peaks() as peak:
                start = time.perf_counter()
                written = way()
                taken = time.perf_counter() - start
            tokens = sum(len(question.token_ids) for question in questions[:count])
            if number:
                found[name].append({"questions_per_s": count / taken, "bytes_per_token": written / tokens} | peak)
    return {"ways": {name: summary(rounds) | {"questions": ways[name][0]} for name, rounds in found.items()}}


def summary(rounds: list[dict[str, float]]) -> dict[str, Any]:
    rates = [one["questions_per_s"] for one in rounds]
    return {
        "questions_per_s": {"median": statistics.median(rates), "values": rates},
        "bytes_per_token": rounds[0]["bytes_per_token"],
        "host_gib": max(one["host_gib"] for one in rounds),
        "device_gib": max(one["device_gib"] for one in rounds),
    }


def notebook_loop(loaded: Loaded, questions: list[Reading]) -> int:
    """The original's loop without its last step, the saving; returns the bytes that its file takes."""
    logits = []
    for question in questions:
        output = plain_logits(loaded, question.token_ids)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        logits.append(output.to("cpu"))
    return sum(one.nbytes for one in logits)


def plain_logits(loaded: Loaded, token_ids: list[int]) -> torch.Tensor:
    """The model's own forward with all logits, [1, tokens, vocabulary]."""
    ids = torch.tensor([token_ids])
    logits: torch.Tensor
    if loaded.teacher.backend == "exllamav2":
        logits = loaded.own.forward(ids)
        return logits
    with torch.inference_mode():
        logits = loaded.own(ids.to(device())).logits
    return logits


def capture(loaded: Loaded, questions: list[Reading], batch_rows: int, folder: Path) -> int:
    """A whole store on disk; returns its bytes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    writer = StoreWriter(folder, backends.identity(loaded.teacher), *ABOUT, key="", batch_rows=batch_rows)
    shards = list(range(-(-len(questions) // writer.shard_examples)))
    with progress((), "capture", "question", len(questions)) as bar:
        fill(loaded.ours, questions, writer, shards, batch_rows, bar)
    head = folder.parent / HEAD_FOLDER
    writer.finish(read_head_manifest(head).sha256 if head.exists() else None)
    return sum(path.stat().st_size for path in folder.iterdir())


def exactness(loaded: Loaded, questions: list[Reading], folder: Path) -> dict[str, Any]:
    """How far logits rebuilt from a store are from the model's own, and what that does to the loss."""
    questions = questions[:64]
    shutil.rmtree(folder / HEAD_FOLDER, ignore_errors=True)
    (folder / HEAD_FOLDER).mkdir()
    write_head(folder / HEAD_FOLDER, backends.identity(loaded.teacher), backends.read_head(loaded.teacher))
    for name in ("exact", "exact again"):
        capture(loaded, questions, 1, folder / name)
    opened = TeacherStore(folder / "exact")
    opened.head = opened.head.to(device())
    compared = [compare_question(loaded, opened, question) for question in questions]
    # What the library does not repeat itself (few tokens, quantized layers) says nothing about what is rebuilt.
    repeated = [one for one in compared if one["own, twice"] == 0]
    return {
        "questions": len(questions),
        "two captures have the same bytes": contents(folder / "exact") == contents(folder / "exact again"),
        "questions whose logits the library repeats": len(repeated),
        "longest question whose logits it does not": max(
            (one["tokens"] for one in compared if one["own, twice"]), default=None
        ),
        "largest": {key: max(one[key] for one in repeated) for key in repeated[0] if key != "tokens"},
        "largest of what it does not repeat": max(one["own, twice"] for one in compared),
        "mean relative difference of the reverse-KL loss": statistics.mean(one["loss"] for one in repeated),
        "batched": batched_difference(loaded, questions[: loaded.teacher.batch_rows]),
    }


def compare_question(loaded: Loaded, opened: TeacherStore, question: Reading) -> dict[str, float]:
    """Largest differences of one question's logits: the model's own, rebuilt by its modules, and by the stored head."""
    own, again = (plain_logits(loaded, question.token_ids)[0].to(device()).float() for _ in range(2))
    states, head = opened.states(question.example_id).to(device()), opened.head
    assert isinstance(head, TeacherHead)
    rebuilt = opened.logits(question.example_id)
    own, again = own[:, : rebuilt.shape[1]], again[:, : rebuilt.shape[1]]
    exact = head.normalized(states).double() @ head.weight.double().T
    found = {
        "tokens": len(question.token_ids),
        "own, twice": float((own - again).abs().max()),
        "own, deviation": float(own.std()),
        "stored head": float((rebuilt - own).abs().max()),
        "stored head, from a product in float64": float((rebuilt - exact).abs().max()),
        "own, from a product in float64": float((own - exact).abs().max()),
        "loss": loss_difference(own, rebuilt),
    }
    if loaded.teacher.backend == "exllamav2":
        norm, own_head = loaded.own.modules[loaded.own.head_layer_idx - 1 :]
        with torch.inference_mode():
            through_modules = own_head.forward(norm.forward(states[None]))[0, :, : rebuilt.shape[1]]
        found["model's own modules"] = float((through_modules.float() - own).abs().max())
    return found


def loss_difference(own: torch.Tensor, rebuilt: torch.Tensor) -> float:
    """How far, relatively, the reverse-KL loss of a student at some distance moves."""
    torch.manual_seed(0)
    student = own + own.std() * torch.randn_like(own)
    softened = [(logits.double() / TEMPERATURE).log_softmax(-1) for logits in (student, own, rebuilt)]
    losses = [float(reverse_kl(softened[0], teacher)[0].mean()) for teacher in softened[1:]]
    return abs(losses[1] / losses[0] - 1)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def batched_difference(loaded: Loaded, questions: list[Reading]) -> dict[str, float]:
    """How far states move in a right-padded batch."""
    batch = [question.token_ids for question in questions]
    together, *alone = loaded.ours.states([batch, *([token_ids] for token_ids in batch)])
    alone = [states for (states,) in alone]
    moved = max(float((a - b).abs().max()) for a, b in zip(together, alone, strict=True))
    return {"rows": len(batch), "largest difference of states": moved, "their deviation": float(alone[0].float().std())}


def host_memory(loaded: Loaded, questions: list[Reading], folder: Path) -> dict[str, float]:
    """GiB of host memory that a capture in batches takes above the loaded model's, by number of questions."""
    found = {}
    for count in (min(100, len(questions)), len(questions)):
        with peaks() as peak:
            capture(loaded, questions[:count], loaded.teacher.batch_rows, folder / "memory")
        found[str(count)] = peak["host_gib"]
    return found


def rebuilding(size: Size) -> dict[str, Any]:
    """Logits per second from stored states of the 405B teacher's width, beside the device's own matmul rate."""
    hidden, vocabulary = size.wide_hidden, size.llama["vocab_size"]
    dtype = torch.float16 if device() == "cuda" else torch.float32
    square = min(8192, 32 * hidden // 4)
    a, b = (torch.randn(square, square, device=device(), dtype=dtype) for _ in range(2))
    rate = 2 * square**3 / seconds_each(lambda: a @ b)
    weight = torch.randn(vocabulary, hidden, device=device(), dtype=dtype)
    head = TeacherHead(torch.ones(hidden, device=device()), weight, 1e-5)
    found: dict[str, Any] = {"hidden": hidden, "vocabulary": vocabulary, "matmul_tflops": rate / 1e12}
    for tokens in (64, 256, 1024):
        states = torch.randn(tokens, hidden, dtype=torch.float16)
        there = states.to(device())
        taken = seconds_each(lambda there=there: head.logits(there))  # type: ignore[misc]
        found[f"{tokens} tokens"] = {
            "ms": taken * 1e3,
            "share_of_matmul": 2 * tokens * hidden * vocabulary / taken / rate,
            "ms_from_host_memory": seconds_each(lambda states=states: head.logits(states)) * 1e3,  # type: ignore[misc]
        }
    return found


def seconds_each(work: Callable[[], object], times: int = 20) -> float:
    for _ in range(3):
        work()
    synchronize()
    start = time.perf_counter()
    for _ in range(times):
        work()
    synchronize()
    return (time.perf_counter() - start) / times


@contextmanager
def peaks() -> Iterator[dict[str, float]]:
    """How far resident host memory and allocated device memory climb inside the block, in GiB above its beginning."""
    gc.collect()
    peak: dict[str, float] = {}
    stop, highest = threading.Event(), [resident()]
    began, began_device = resident(), 0

    def watch() -> None:
        while not stop.wait(0.01):
            highest[0] = max(highest[0], resident())

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        began_device = torch.cuda.memory_allocated()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        stop.set()
        watcher.join()
    device_peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    peak |= {"host_gib": (highest[0] - began) / GIB, "device_gib": (device_peak - began_device) / GIB}


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
