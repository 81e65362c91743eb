"""Split strings, with one meaning for every kind of source: that of TensorFlow Datasets.

`train`, `train[:10%]`, `train[1000:2000]`, `train[:1%]+train[50%:51%]`, `train[-100:]`, `all`.
"""

from collections.abc import Mapping


def intervals(split: str, lengths: Mapping[str, list[int]], where: str) -> list[tuple[str, int, int]]:
    """The (name, start, stop) that `split` asks for, in its order.

    lengths: for each split that there is, the number of images in each of its files (one number if there are no files).
    where: the dataset, for messages. Raises ValueError for what cannot be parsed, is not there, or holds no image.
    """
    if split in lengths:
        found = [(split, 0, sum(lengths[split]))]
    else:
        import tensorflow_datasets as tfds

        infos = {name: tfds.core.SplitInfo(name=name, shard_lengths=n, num_bytes=0) for name, n in lengths.items()}
        try:
            parsed = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
        except (ValueError, NotImplementedError) as error:
            raise ValueError(f"split {split!r} of {where}: {_last_line(error)}; {_expected(lengths)}") from error
        found = [(part.splitname, part.from_ or 0, sum(lengths[part.splitname]) if part.to is None else part.to)
                 for part in parsed]
    for name, start, stop in found:
        if start >= stop:
            raise ValueError(f"split {split!r} of {where} asks for {name}[{start}:{stop}], which holds no image; "
                             f"{_expected(lengths)}")
    return found


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1].split(" See format at")[0].rstrip(".")


def _expected(lengths: Mapping[str, list[int]]) -> str:
    return (f"there are {', '.join(lengths)}; expected one of these, a part such as 'train[:10%]' or "
            "'train[1000:2000]', or a sum such as 'train+test'")
