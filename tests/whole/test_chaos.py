"""The short chaos run; and copies of the system that are broken on purpose, which it must find."""

import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from drills import break_copy, often
from system import run_program

from app.config import ROOT

pytestmark = pytest.mark.drill


def run_chaos(*arguments: str, tree=ROOT) -> subprocess.CompletedProcess:
    result = run_program([sys.executable, tree / "stress" / "chaos.py", *arguments], 3600)
    if logs := re.search("^logs: (.+)$", result.stdout, re.M):
        shutil.rmtree(logs[1], ignore_errors=True)
    return result


@pytest.mark.parametrize(
    ("shards", "kills"), [(1, often(90, 1000)), (6, often(5, 1000))], ids=["one", "six_shards"]
)
def test_kills_of_each_kind(shards, kills):
    options = ("--shards", str(shards), "--kills", str(kills), "--seed", "1")
    result = run_chaos(*options, "--quick", "--faults", "0.1")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    seen = dict(re.findall(r"'(\w+)': (\d+)", result.stdout.split("kills:")[1].split("\n")[0]))
    assert set(seen) == {"web", "worker", "redis", "postgres", "all"}
    assert all(int(count) >= kills // 5 for count in seen.values())


# Each a piece of the code, what is put in its place, what chaos then does, and what it must find.
SABOTAGES = {
    "the order is queued before the claim is decided": (
        [
            (
                "app/stock/lua/claim.lua",
                "    elseif product.free < quantity then\n",
                """    elseif product.free < quantity then
      redis.set_repl(redis.REPL_ALL)
      redis.call('XADD', KEYS[5], redis.call('INCR', KEYS[7]) .. '-0', 'order', table.concat(
        { claim.user, product.id, claim.units, product.price, string.format('%d', now), '' }, ' '))
""",
            ),
        ],
        ("--kinds", "cut postgres", "--kills", "15"),
        {"refused-but-stored"},
    ),
    "the outbox is trimmed before the commit": (
        [
            (
                "app/orders/drain.py",
                "        connection.commit()\n",
                "        import time\n"
                "        _settle(shard, generation, rows, dead)\n"
                "        time.sleep(1)\n"
                "        connection.commit()\n",
            ),
        ],
        # So long between the two steps that nearly each cut hits it.
        ("--kinds", "cut postgres", "--kills", "10"),
        {"lost"},
    ),
    "a claim without an answer is sent again": (
        [
            (
                "app/stock/loop_line.py",
                "        else:\n"
                '            self._tell(batch, cast("Exception", answer))\n\n'
                "    def _once_more(",
                """        else:
            asyncio.get_running_loop().call_later(0.1, self._once_more, batch, False, answer)

    def _once_more(""",
            ),
        ],
        ("--kinds", "lose redis", "--kills", "8"),
        {"duplicate"},
    ),
}


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """Run all sabotaged copies at once: mostly they wait."""

    trees = {name: tmp_path_factory.mktemp("broken") for name in SABOTAGES}

    def run(name):
        tree = trees[name]
        changes, arguments, _ = SABOTAGES[name]
        break_copy(tree, changes)
        # When exactly a fault hits is left to chance, so that a run may miss what is broken.
        for seed in ("7", "8", "9"):
            result = run_chaos(*arguments, "--quick", "--faults", "0", "--seed", seed, tree=tree)
            if result.returncode:
                break
        return name, result

    with ThreadPoolExecutor(len(SABOTAGES)) as pool:
        return dict(pool.map(run, SABOTAGES))


@pytest.mark.parametrize("name", SABOTAGES)
def test_the_harness_finds(broken, name):
    result = broken[name]
    found = set(re.findall(r"VIOLATED ([\w-]+)", result.stdout))
    assert result.returncode == 1
    assert SABOTAGES[name][2] <= found, result.stdout[-3000:] + result.stderr[-1000:]
