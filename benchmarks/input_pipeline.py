"""The input pipeline alone: JPEGs in tars to uint8 pictures and ids. Needs no accelerator and no model.

    python benchmarks/input_pipeline.py                  pictures a second, and where the time goes
    python benchmarks/input_pipeline.py --memory         resident memory over 100,000 samples

The pictures are made here: 500 x 400, smooth noise, grain and shapes, 50 to 100 kB each. "A core" is a second of
processor time, of the program and its workers together, so that a busy machine changes the figure little.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import resource
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from mgpt4_jax.data.batching import pad_sequences
from mgpt4_jax.data.images import load_image, resize
from mgpt4_jax.data.loading import Loader
from mgpt4_jax.data.prompts import VICUNA_V0
from mgpt4_jax.data.rows import RowBuilder
from mgpt4_jax.data.samples import Source
from mgpt4_jax.data.sources import open_source
from mgpt4_jax.train_config import DataConfig, SourceConfig, TextConfig

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "tests/golden/data/minigpt4_vicuna/llm"
WORDS = "a red cat sits on the blue mat beside two green dogs while rain falls over old town roofs".split()
SIZE = 224


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=1600, help="pictures in the tars (default 1600)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="times that each figure is taken; the median counts")
    parser.add_argument("--scratch", type=Path, help="where the tars are written (default: a temporary directory)")
    parser.add_argument("--memory", action="store_true", help="measure memory instead, on pictures of 64 x 48")
    parser.add_argument("--samples", type=int, default=100_000, help="samples of --memory")
    parser.add_argument("--workers", type=int, default=2, help="worker processes of --memory")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        if args.memory:
            source = write_tars(Path(scratch), args.pictures, width=64, height=48)
            measure_memory(source, args.samples, args.batch_size, args.workers)
            return
        source = write_tars(Path(scratch), args.pictures, width=500, height=400)
        print(f"load of the machine: {', '.join(f'{load:.2f}' for load in os.getloadavg())} on {os.cpu_count()} cores")
        profile(open_source(source), args.batch_size, args.rounds)
        measure_throughput(source, args.pictures, args.batch_size, args.rounds)
        compare_draft(args.rounds)


def measure_throughput(source: SourceConfig, pictures: int, batch_size: int, rounds: int) -> None:
    """Through the loader, as training does."""
    print("\n| workers | threads in each | pictures a second of processor time | pictures a second |")
    print("|---|---|---|---|")
    for workers, threads in ((0, 1), (0, 2), (1, 1), (1, 2), (2, 1)):
        figures = [run(source, pictures // batch_size, batch_size, workers, threads) for _ in range(rounds)]
        a_core, a_second = np.median(figures, axis=0)
        print(f"| {workers} | {threads} | {a_core:.0f} | {a_second:.0f} |", flush=True)


def run(source: SourceConfig, batches: int, batch_size: int, workers: int, threads: int) -> tuple[float, float]:
    """Pictures for each second of processor time, and for each second."""
    loader = make_loader(source, batch_size, workers, threads)
    with loader.batches() as found:
        for _ in range(2 * max(workers, 1)):  # what starting takes is not what going on takes
            next(found)
        start, start_cpu = time.perf_counter(), cpu_seconds()
        for _ in range(batches):
            next(found)
        seconds, cpu = time.perf_counter() - start, cpu_seconds() - start_cpu
    return batches * batch_size / cpu, batches * batch_size / seconds


def make_loader(source: SourceConfig, batch_size: int, workers: int, threads: int) -> Loader:
    data = DataConfig((source,), num_workers=workers, num_threads=threads)
    rows = RowBuilder(TOKENIZER, TextConfig(), VICUNA_V0, 32, clean_captions=True)
    return Loader([open_source(source)], rows, data, batch_size=batch_size, image_size=SIZE, seed=0)


def cpu_seconds() -> float:
    """Of this process and its living workers."""
    own = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    tick = os.sysconf("SC_CLK_TCK")
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        own += (int(fields[11]) + int(fields[12])) / tick
    return own


def profile(source: Source, batch_size: int, rounds: int) -> None:
    """Where the time of one thread goes, stage by stage."""
    stages: dict[str, list[float]] = {}

    @contextmanager
    def timed(stage: str) -> Iterator[None]:
        start = time.thread_time()
        yield
        stages.setdefault(stage, []).append((time.thread_time() - start) / batch_size * 1e3)

    rows = RowBuilder(TOKENIZER, TextConfig(), VICUNA_V0, 32, clean_captions=True)
    size = 0
    for number in range(4 * rounds):
        places = np.random.default_rng(number).integers(0, len(source), batch_size).tolist()
        with timed("read from the tar"):
            samples = [source[place] for place in places]
        with timed("decode"):
            images = [load_image(sample.image) for sample in samples]
        with timed("resize"):
            pictures = [resize(image, SIZE) for image in images]
        with timed("tokenise and lay out"):
            sequences = [rows.row(sample) for sample in samples]
        with timed("collate"):
            np.stack(pictures)
            pad_sequences(sequences, 96, pad_id=0)
        size += sum(len(sample.image) for sample in samples)
    print(f"mean size of a JPEG: {size / (4 * rounds * batch_size) / 1e3:.0f} kB")
    print_table(stages)


def print_table(stages: dict[str, list[float]]) -> None:
    medians = {stage: float(np.median(values)) for stage, values in stages.items()}
    whole = sum(medians.values())
    print("\n| stage | ms a picture | share |\n|---|---|---|")
    for stage, value in medians.items():
        print(f"| {stage} | {value:.3f} | {value / whole:.1%} |")
    print(f"| all | {whole:.3f} | {1e3 / whole:.0f} pictures a second |")


def compare_draft(rounds: int) -> None:
    """Pillow's ``draft`` decodes a JPEG at half size or less. It is not used: it changes the pixels."""
    print("\n| picture | decode and resize, ms | with draft, ms | largest difference, of 255 | mean |")
    print("|---|---|---|---|---|")
    for width, height in ((500, 400), (1000, 800)):
        rng = np.random.default_rng(0)
        files = [picture(rng, width, height) for _ in range(20)]
        exact = [resize(load_image(file), SIZE).astype(int) for file in files]
        drafted = [resize(draft(file), SIZE).astype(int) for file in files]
        differences = np.abs(np.array(exact) - np.array(drafted))
        usual = median_ms(lambda files=files: [resize(load_image(file), SIZE) for file in files], rounds, len(files))
        quick = median_ms(lambda files=files: [resize(draft(file), SIZE) for file in files], rounds, len(files))
        cells = (f"{width} x {height}", f"{usual:.2f}", f"{quick:.2f}", differences.max(), f"{differences.mean():.2f}")
        print(f"| {' | '.join(map(str, cells))} |")


def draft(file: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(file))
    image.draft("RGB", (SIZE, SIZE))
    return image.convert("RGB")


def median_ms(work: Callable[[], object], rounds: int, count: int) -> float:
    times = []
    for _ in range(rounds):
        start = time.thread_time()
        work()
        times.append((time.thread_time() - start) / count * 1e3)
    return float(np.median(times))


def measure_memory(source: SourceConfig, samples: int, batch_size: int, workers: int) -> None:
    """Resident memory of the program and of each worker, ten times on the way."""
    loader = make_loader(source, batch_size, workers, 2)
    step = max(samples // 10, 1)
    print(f"{samples:,} samples, batches of {batch_size}, {workers} workers of 2 threads\n")
    print("| " + " | ".join(["samples", "this process, MB", *(f"worker {n}, MB" for n in range(workers))]) + " |")
    print("|---" * (workers + 2) + "|")
    done = 0
    start = time.perf_counter()
    with loader.batches() as batches:
        while done < samples:
            next(batches)
            before, done = done, done + batch_size
            if done == batch_size or before // step != done // step:
                pids = sorted(child.pid for child in multiprocessing.active_children())
                cells = [f"{resident_mb(pid):.1f}" for pid in (os.getpid(), *pids)]
                print(f"| {done:,} | {' | '.join(cells)} |", flush=True)
    print(f"\n{done / (time.perf_counter() - start):.0f} samples a second")


def resident_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1e3


def write_tars(folder: Path, count: int, *, width: int, height: int, per_tar: int = 400) -> SourceConfig:
    """Tars as img2dataset writes them: a JPEG and a JSON for each sample."""
    rng = np.random.default_rng(0)
    for first in range(0, count, per_tar):
        with tarfile.open(folder / f"{first // per_tar:05d}.tar", "w") as tar:
            for number in range(first, min(first + per_tar, count)):
                caption = " ".join(rng.choice(WORDS, rng.integers(5, 20)))
                add(tar, f"{number:09d}.jpg", picture(rng, width, height))
                add(tar, f"{number:09d}.json", json.dumps({"caption": caption}).encode())
    return SourceConfig("webdataset", str(folder / "*.tar"))


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def picture(rng: np.random.Generator, width: int, height: int) -> bytes:
    """A JPEG of quality 85 with as much detail as a photograph."""
    coarse = rng.normal(128, 50, (height // 8, width // 8, 3)).clip(0, 255).astype(np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(smooth)
    for _ in range(6):
        x, y = int(rng.integers(width)), int(rng.integers(height))
        draw.ellipse((x, y, x + width // 6, y + height // 8), fill=tuple(rng.integers(0, 256, 3).tolist()))
    grain = rng.normal(0, 8, (height, width, 1)) + rng.normal(0, 3, (height, width, 3))
    file = io.BytesIO()
    Image.fromarray((np.asarray(smooth) + grain).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    return file.getvalue()


if __name__ == "__main__":
    main()
