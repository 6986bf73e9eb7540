"""Time and memory of k-NN over as many features as ImageNet gives, in files as evaluations do.

The features are one random block, shifted from chunk to chunk: the time and memory of a lookup do
not depend on the values. The files take 4 bytes a value below --scratch, and are removed.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from _about import HERE, about, save, table

from eval.frozen.features import EncodedSets, LabelledFeatures
from eval.frozen.store import CHUNK_SIZE, Features, FeatureStore
from eval.knn import KnnSettings, evaluate

NUM_CLASSES = 1000


def main() -> None:
    """Write the features, look up, and save what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num_images", type=int, default=1_281_167)
    parser.add_argument("--num_features", type=int, default=768)
    parser.add_argument("--num_queries", type=int, default=200)
    parser.add_argument("--scratch", type=Path, help="folder of the files (default: the system's)")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    args = parser.parse_args()
    head = about("knn.py", "cpu")
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        data = _write(Path(folder), args.num_images, args.num_features, args.num_queries)
        rows = [_measure(data, standardize) for standardize in (False, True)]
    heads = ("standardize", "seconds", "own memory, GB", "mapped files, GB")
    title = f"k-NN, {args.num_images} x {args.num_features}, {args.num_queries} queries"
    print(save(args.output, "knn-cpu", title, head, table(heads, rows)))


def _write(folder: Path, num_images: int, num_features: int, num_queries: int) -> EncodedSets:
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(CHUNK_SIZE, num_features, generator=generator)
    store = FeatureStore(folder, {"benchmark": "knn"}, num_images)
    store.prepare()
    for number in range(store.num_chunks):
        store.write(number, block.roll(number, 1)[: len(store.rows(number))])
    queries = Features([torch.randn(num_queries, num_features, generator=generator)])
    return EncodedSets(
        LabelledFeatures(store.read(), torch.arange(num_images) % NUM_CLASSES),
        LabelledFeatures(queries, torch.zeros(num_queries, dtype=torch.int64)),
        NUM_CLASSES,
    )


def _measure(data: EncodedSets, standardize: bool) -> tuple[str, ...]:
    start = time.perf_counter()
    evaluate(data, KnnSettings(standardize=standardize))
    seconds = time.perf_counter() - start
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, mapped = (int(status[key].split()[0]) / 2**20 for key in ("RssAnon", "RssFile"))
    return str(standardize), f"{seconds:.1f}", f"{own:.2f}", f"{mapped:.2f}"


if __name__ == "__main__":
    main()
