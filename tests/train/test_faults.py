"""One run that nearly everything happens to; `python -m tests.train.faults` is the long form."""

import pytest

from tests.train import faults


def test_a_run_that_much_happens_to_ends_like_one_that_nothing_happens_to(tmp_path):
    bench = faults.Bench(tmp_path, seed=0, references=1)
    bench.reference()
    happened = [faults.kill("save", 0.0), faults.terminate("evaluation"), faults.kill("save", 0.0),
                faults.then_spoil(faults.terminate("training", 18), "cut off", bench.rng)]
    with faults.small_disk(tmp_path / "disk") as (folder, error):
        if not error:
            happened.append(faults.fill(folder, 20, room_again=True))
        bench.case("all", bench.run(workdir=folder / "run"), happened, "one")
    result, = bench.results["all"]
    assert result.wrong == ""
    assert len(result.faults) == len(happened)
    assert "SIGTERM in evaluation" in result.faults
    if error:
        pytest.skip(f"a small disk cannot be mounted, so that all but a full one was tried: {error}")
