"""The choice of a schedule: never worse than by hand, within memory, as a command, and as PyTorch loads it."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from anabranch.cli import app
from anabranch.plan import check, simulate
from anabranch.schedule.base import Costs, Schedule, one_f_one_b
from anabranch.schedule.report import read_bytes, read_costs
from anabranch.schedule.search import chunked, greedy, hand_made, judge, refill, search, to_torch
from anabranch.schedule.zero_bubble import zb_h1


def random_costs(rng, p):
    return Costs(*rng.uniform(0.5, 2, (3, p)), message=float(rng.uniform(0, 0.3)), kept=float(rng.uniform(0.3, 1)))


def test_never_worse_than_by_hand_and_within_memory():
    rng = np.random.default_rng(0)
    better = 0
    for _ in range(8):
        p = int(rng.integers(2, 6))
        m, memory, costs = int(rng.integers(p, 3 * p)), float(rng.choice([p, 2 * p])), random_costs(rng, p)
        found = search(p, m, costs, memory)
        hand = [make(costs) for make in hand_made(p, m)]
        judged = [judge(one, chunked(costs, p, one.stages), memory) for one in hand]
        best = min(one.step for one in judged if one.fits)
        assert found[0].fits and found[0].step <= best
        better += found[0].step < best - 1e-9
        plan = check(found[0].schedule.plan(found[0].costs, capacity=memory * (1 + 1e-9)))
        trace = simulate(plan)
        assert trace.makespan == pytest.approx(found[0].step) and trace.peak.max() == pytest.approx(found[0].peak)
    assert better >= 4


def test_costs_of_finer_cuts_have_the_same_sums():
    costs = Costs(forward=[1, 2, 4], activation=6)
    cut = chunked(costs, 3, 6)
    np.testing.assert_allclose(cut.forward, [0.5, 0.5, 1, 1, 2, 2])
    assert np.sum(cut.activation) == 18


def test_greedy_and_refilled_are_sound():
    rng = np.random.default_rng(1)
    for _ in range(5):
        p = int(rng.integers(1, 6))
        costs, m = random_costs(rng, p), int(rng.integers(p, 3 * p))
        check(greedy(p, m, costs, memory=2 * p).plan(costs, capacity=2 * p + 1e-9))
        for late in (False, True):
            given = zb_h1(p, m)
            made = refill(given, costs, p, late=late)
            check(made.plan(costs, capacity=p + 1e-9))


def run(*args):
    return CliRunner().invoke(app, ["plan", *map(str, args)])


def test_the_command(tmp_path):
    cost, csv, svg = (tmp_path / name for name in ("cost.json", "plan.csv", "plan.svg"))
    cost.write_text(json.dumps({"forward": [1, 1, 1.5], "backward": 2, "activation": 2**30}))
    found = run("--stages", 3, "--microbatches", 6, "--cost", cost, "--memory", "4GiB", "--torch", csv, "--svg", svg)
    assert found.exit_code == 0 and "V-Half" in found.output and "GiB" in found.output and "0 |" in found.output
    assert len(csv.read_text().splitlines()) == 3 and svg.read_text().startswith("<svg")
    as_json = json.loads(run("--stages", 2, "--microbatches", 2, "--pick", "1F1B", "--json").output)
    assert as_json["best"] == "1F1B" and as_json["found"][0]["step"] <= 9


@pytest.mark.parametrize(
    "args, said",
    [
        (["--memory", "much"], "memory must be a size such as 16GiB, got 'much'"),
        (["--pick", "ZB-X"], "no schedule 'ZB-X'; there are"),
        (["--cost", "nowhere.json"], "nowhere.json"),
    ],
)
def test_the_command_refuses(args, said):
    found = run("--stages", 2, "--microbatches", 2, *args)
    assert found.exit_code == 1 and said in found.output


@pytest.mark.parametrize(
    "text, said",
    [
        ("{", "is not JSON"),
        ("[]", "holds no object"),
        ('{"foward": 1}', "unknown cost 'foward'; did you mean 'forward'"),
        ('{"forward": "1"}', "forward must be a number or a list of numbers, got '1'"),
        ('{"weight": -1}', "weight must be finite and not negative"),
    ],
)
def test_costs_refused(tmp_path, text, said):
    (tmp_path / "cost.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_costs(tmp_path / "cost.json")
    assert read_bytes("2GB") == 2e9


def test_replicas_have_no_form_in_torch(tmp_path):
    twice = Schedule("twice", one_f_one_b(2, 2).orders, ((0, 1), (1, 0)))
    with pytest.raises(ValueError, match="twice has the weights of a stage on more than one device"):
        to_torch(twice, tmp_path / "plan.csv")


TORCH = """
import sys
import torch, torch.distributed as dist, torch.multiprocessing as mp
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime

P, V, M, D = 2, int(sys.argv[2]), 4, 8

def rank_of(stage):
    return stage if stage < P else 2 * P - 1 - stage

def work(rank, path, port):
    dist.init_process_group("gloo", rank=rank, world_size=P, init_method=f"tcp://127.0.0.1:{port}")
    torch.manual_seed(0)
    layers = [torch.nn.Sequential(torch.nn.Linear(D, D), torch.nn.Tanh()) for _ in range(P * V)]
    x, y = torch.randn(M * 2, D), torch.randn(M * 2, D)
    whole = torch.nn.Sequential(*layers)
    loss = lambda out, target: torch.nn.functional.mse_loss(out, target)
    sum(loss(whole(a), b) / M for a, b in zip(x.chunk(M), y.chunk(M))).backward()
    expected = [[p.grad.clone() for p in layer.parameters()] for layer in layers]
    whole.zero_grad()
    mine = [s for s in range(P * V) if rank_of(s) == rank]
    stages = [PipelineStage(layers[s], s, P * V, torch.device("cpu"), input_args=x.chunk(M)[0]) for s in mine]
    schedule = _PipelineScheduleRuntime(stages, M, loss_fn=loss)
    schedule._load_csv(path)
    schedule.step(*((x,) if 0 in mine else ()), **({"target": y} if P * V - 1 in mine else {}))
    for s in mine:
        for p, g in zip(layers[s].parameters(), expected[s]):
            torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-6)
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.spawn(work, args=(sys.argv[1], int(sys.argv[3])), nprocs=P)
    print("equal")
"""


@pytest.mark.parametrize("name, v", [("ZB-H1", 1), ("ZB-V", 2)])
def test_torch_loads_and_runs_it(tmp_path, name, v):
    pytest.importorskip("torch.distributed.pipelining")
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    schedules = {one.schedule.name: one.schedule for one in search(2, 4, Costs())}
    to_torch(schedules[name], tmp_path / "plan.csv")
    (tmp_path / "run.py").write_text(TORCH)
    command = [sys.executable, "run.py", "plan.csv", str(v), str(port)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, env=env, check=False)
    assert done.returncode == 0 and "equal" in done.stdout, done.stderr[-3000:]
