"""How runs are submitted to Slurm, and the errors where they cannot be."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster_runs import CONFIG, THREE, ClusterRun, go_on, launch, local, straight, weights
from waits import wait_for

from ssl_c2f.launch import cluster, schedule
from ssl_c2f.launch.status import jobs_of

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(500), pytest.mark.usefixtures("slurm")]
ONE_CPU = ("--cpus-per-task", 1, "--mem", "500MB")
TUNING = """
phases: [{name: tune, steps: 5, batch_size: 8, lr: 1.0e-3}]
train: {device: cpu, rehearse: false}
tracking: {wandb: off}
folds: [1, 2]
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(CONFIG)
    return file


def in_queue() -> str:
    return subprocess.run(["squeue", "-h"], capture_output=True, text=True, timeout=30, check=True).stdout


@dataclass
class Begun:
    """Runs that were submitted at once, since they mostly wait, and the same runs without a cluster."""

    folder: Path
    three: ClusterRun
    failing: ClusterRun
    seeds: list[ClusterRun]
    pipeline: tuple[object, ...]  # the words of its launch, in which fold 2 cannot be written
    relaunched: Future[tuple[list[str], str]]  # of `three`, while its first phase ran: the ids before, what was said
    straight: dict[str, Future[bytes]]


@pytest.fixture(scope="module")
def begun(slurm: None, sounds: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Begun]:
    folder = tmp_path_factory.mktemp("begun")
    for name, text in (("tiny", CONFIG), ("three", THREE), ("tuning", TUNING)):
        (folder / f"{name}.yaml").write_text(text)
    tiny, data = folder / "tiny.yaml", f"data.root={sounds}"

    def submit(*words: object) -> None:
        status, said = launch(*words, data, "--cluster", "slurm", *ONE_CPU)
        assert status == 0, said

    three = ClusterRun(folder / "three", (folder / "three.yaml", data, "--nodes", 2, "--ngpus", 1, *ONE_CPU), 2)
    failing = ClusterRun(folder / "failing", (tiny, data, "phases.0.lr=1e30", "train.max_nonfinite=0", *ONE_CPU))
    assert three.launch().count("submitted") == 3
    failing.launch()
    submit("pretrain", tiny, "--run-dir", folder / "seeds", "--seeds", "0,1", "--snapshot")
    pipeline = ("pipeline", tiny, "--run-dir", folder / "piped", "phases.0.steps=5", "phases.1.steps=5",
                "--finetune-config", folder / "tuning.yaml")
    (folder / "piped/finetune/default").mkdir(parents=True)
    (folder / "piped/finetune/default/fold-2").touch()  # a file where a folder is to be
    submit(*pipeline)
    seeds = [ClusterRun(folder / "seeds" / f"seed={seed}", ()) for seed in (0, 1)]
    with ThreadPoolExecutor() as pool:
        relaunched = pool.submit(launch_again, three)
        straights = {
            "three": pool.submit(straight, folder / "three.yaml", sounds, folder / "straight-three", 2),
            "tiny": pool.submit(straight, tiny, sounds, folder / "straight", 1),
            "local": pool.submit(local, tiny, sounds, folder / "local", 1),
        }
        yield Begun(folder, three, failing, seeds, (*pipeline, data), relaunched, straights)


def launch_again(run: ClusterRun) -> tuple[list[str], str]:
    """Launch a run once more while its first phase stands still in its middle."""
    ids = run.ids
    pids = run.stop_at("coarse", 5, attempt=1)
    try:
        return ids, run.launch()
    finally:
        go_on(pids)


def test_a_phase_that_raises_takes_its_children_along(begun: Begun) -> None:
    run = begun.failing
    run.finish(200)
    coarse, fine = jobs_of(run.path)
    assert coarse.failed and coarse.error.startswith("UserError: 1 steps had a loss that is not finite")
    assert fine.failed and fine.state.startswith("CANCELLED")
    assert coarse.log.exists()
    status, said = launch("status", run.path)
    assert status == 0 and coarse.error in said and str(coarse.log) in said


def test_launching_a_running_run_submits_nothing_twice(begun: Begun) -> None:
    ids, said = begun.relaunched.result()
    assert "submitted" not in said and begun.three.ids == ids
    for part, number, state in zip(("coarse", "middle", "fine"), ids, ("RUNNING", "PENDING", "PENDING"), strict=True):
        assert f"{part} is already in the queue as job {number}: {state}" in said


def test_seeds_are_arrays_that_run_from_a_copy_of_the_code(begun: Begun) -> None:
    first, second = begun.seeds
    folder = begun.folder / "seeds" / "submitit"
    assert [run.id("coarse").partition("_")[2] for run in begun.seeds] == ["0", "1"]
    coarse, fine = (first.id(part).partition("_")[0] for part in ("coarse", "fine"))
    script = (folder / f"{fine}_submission.sh").read_text()
    assert f"--dependency=aftercorr:{coarse}" in script and "--array=0-1" in script
    for run in begun.seeds:
        run.finish()
        (started,) = run.events("started", "fine")
        assert started["code"].startswith(str(folder / "code-"))
    assert weights(first.path) != weights(second.path)
    assert launch("status", begun.folder / "seeds")[1].count(" done ") == 4


def test_one_node_equals_this_machine(begun: Begun) -> None:
    begun.seeds[0].finish()
    assert weights(begun.seeds[0].path) == begun.straight["tiny"].result() == begun.straight["local"].result()


def test_pipeline_outlives_a_fold_and_ends_with_scores_and_a_page(begun: Begun) -> None:
    run = ClusterRun(begun.folder / "piped", ())
    tuned = ClusterRun(run.path / "finetune" / "default", ())
    assert len(run.ids) == 2 and len(tuned.ids) == 3
    tuned.finish()
    first, second, scores = jobs_of(tuned.path)
    assert first.state == "done" and first.step == "5/5"
    assert second.failed and second.error == f"UserError: cannot write {tuned.path / 'fold-2' / 'lock'}: File exists"
    assert scores.failed and scores.state.startswith("CANCELLED") and not (tuned.path / "scores.json").exists()
    said = launch("status", run.path)[1]
    assert second.error in said and str(second.log) in said

    (tuned.path / "fold-2").unlink()
    status, said = launch(*begun.pipeline, "--cluster", "slurm", *ONE_CPU)
    assert status == 0 and re.findall(r"submitted (\S+)", said) == ["fold-2", "scores"]
    tuned.finish()
    said = launch("status", run.path)[1]
    assert set(yaml.safe_load((tuned.path / "scores.json").read_text())["folds"]) == {"1", "2"}, said
    assert (run.path / "report.html").exists()
    assert said.count(" done ") == 5

    more = ("finetune", begun.folder / "tuning.yaml", "--ckpt", run.path, "folds=[1]", "--seeds", "0,1")
    assert launch(*more, begun.pipeline[-1], "--cluster", "slurm", *ONE_CPU)[0] == 0
    one = ("evaluate", "--ckpt", tuned.path / "fold-1", begun.pipeline[-1], "--cluster", "slurm", *ONE_CPU)
    status, said = launch(*one, "--wait")
    assert status == 0 and " done " in said and list((tuned.path / "fold-1").glob("evaluation/*/scores.json"))
    for seed in (0, 1):
        variant = ClusterRun(run.path / "finetune" / f"default,seed={seed}", ())
        variant.finish()
        assert variant.id("fold-1").endswith(f"_{seed}") and (variant.path / "scores.json").exists()
    assert launch("status", run.path)[1].count(" done ") == 9


def test_two_nodes_equal_torchrun_and_more_phases_may_follow(begun: Begun) -> None:
    run, config = begun.three, begun.folder / "three.yaml"
    run.finish()
    assert weights(run.path) == begun.straight["three"].result()
    ids = run.ids
    assert "all of it is done" in run.launch() and run.ids == ids

    more = yaml.safe_load(THREE)
    more["phases"].append({"name": "finest", "steps": 4, "batch_size": 8, "lr": 1e-4})
    config.write_text(yaml.safe_dump(more))
    said = run.launch()
    assert said.count("submitted") == 1 and "submitted finest" in said
    assert [run.id(part) for part in ("coarse", "middle", "fine")] == ids
    run.finish()
    assert (run.path / "phases" / "3-finest" / "done").exists()


def test_dry_run_shows_what_is_submitted(tmp_path: Path, config: Path, sounds: Path) -> None:
    words = ("pretrain", config, f"data.root={sounds}", "--run-dir", tmp_path / "run", "--cluster", "slurm",
             "--partition", "short", "--timeout", 5, *ONE_CPU)
    status, shown = launch(*words, "--dry-run")
    assert status == 0 and not (tmp_path / "run").exists()
    status, said = launch(*words)
    assert status == 0, said
    jobs = schedule.read_jobs(tmp_path / "run")
    assert launch("cancel", tmp_path / "run")[0] == 0
    for name in jobs:
        real = (tmp_path / "run" / "submitit" / f"{jobs[name]['id']}_submission.sh").read_text()
        expected = real.replace(f"afterok:{jobs['coarse']['id']}", "'afterok:<coarse>'")
        assert expected.strip() in shown
    wait_for(lambda: not cluster.active([job["id"] for job in jobs.values()]), "the cancelled jobs", 60)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--partition", "nowhere"], "Slurm refuses such a job: "),
        (["--partition", "short", "--timeout", "60"], "Slurm refuses such a job: "),
        (["--nodes", "8"], "Slurm refuses such a job: "),
        (["--mem", "900GB"], "Slurm refuses such a job: "),
        (["--run-dir", "/proc/runs/x"], "cannot write /proc/runs/x"),
        (["phases.0.stepz=3"], "steps"),
        (["data.root=/nowhere"], "/nowhere"),
        (["phases.0.batch_size=7", "--nodes", "2"], "batch_size 7 is no multiple of 2 processes"),
        (["--phases", "coarsest"], "there is no phase coarsest"),
    ],
)
def test_refused_before_anything_is_queued(
    words: list[str], complaint: str, tmp_path: Path, config: Path, sounds: Path
) -> None:
    given = ["pretrain", config, f"data.root={sounds}", "--run-dir", tmp_path / "run", "--cluster", "slurm"]
    status, said = launch(*given, *ONE_CPU, *words)
    assert status == 2
    last = said.strip().splitlines()[-1]
    assert last.startswith("launch.py: ") and complaint in last
    assert not (tmp_path / "run" / "jobs.json").exists() and not re.search(r" run/(coar|fine) ", in_queue())


def test_later_refusal_cancels_what_was_submitted(
    tmp_path: Path, config: Path, sounds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm takes the first job and refuses the second."""
    submit = cluster.submit

    def until_full(resources: cluster.Resources, folder: Path, name: str, *rest: Any) -> list[str]:
        if name.endswith("fine"):
            resources = cluster.Resources(**{**vars(resources), "plain": {"qos": "none", "partition": "nowhere"}})
        return submit(resources, folder, name, *rest)

    monkeypatch.setattr(cluster, "submit", until_full)
    run = ClusterRun(tmp_path / "run", ())
    words = ("pretrain", config, f"data.root={sounds}", "--run-dir", run.path, "--cluster", "slurm", *ONE_CPU)
    status, said = launch(*words)
    assert status == 2 and "Slurm refused run/fine: " in said.strip().splitlines()[-1]
    assert schedule.read_jobs(run.path) == {}
    wait_for(lambda: "run/coar" not in in_queue(), "the first job to go", 60)
