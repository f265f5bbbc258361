from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vespo.rewards import math as math_rewards
from megatron_vespo.rewards.answer_text import last_boxed
from megatron_vespo.rewards.math import math_reward
from megatron_vespo.rewards.pool import RewardItem, RewardPool, RewardResult, load_reward_function
from megatron_vespo.rollout.scoring import Scorer, check_some_worked, describe_failures, reward_statuses
from megatron_vespo.types import Prompt

REPOSITORY = Path(__file__).resolve().parents[3]
DATA = REPOSITORY.parent / "shared" / "data"

CUSTOM_MODULE = """
import os, re, subprocess, sys, time

def by_command(response, answer, metadata):
    command, _, rest = response.partition(" ")
    if command == "hang":
        time.sleep(600)
    if command == "hang_in_c":
        re.match(r"(a+)+$", "a" * 60 + "b")
    if command == "hang_with_child":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", rest])
        time.sleep(600)
    if command == "exit":
        os._exit(int(rest))
    if command == "sys_exit":
        sys.exit(4)
    if command == "raise":
        raise KeyError(rest)
    if command == "return":
        return eval(rest)
    if command == "pid":
        return os.getpid()
    if command == "allocate":
        return len(bytearray(int(float(rest) * 2**30))) / 2**30
    if command == "keep":
        KEPT.append(bytes(int(float(rest) * 2**30)))
        return len(KEPT)
    if command == "slow":
        time.sleep(float(rest))
    return float(answer == rest) + metadata.get("bonus", 0.0)

def compute_score(solution_str, ground_truth):
    return 1.0

async def later(response, answer, metadata):
    return 1.0

class Scored:
    def __init__(self, response, answer, metadata):
        pass

partial = __import__("functools").partial(lambda extra, r, a, m: 1.0, 0)

CONSTANT = 3
KEPT = []
if "FAIL_IN_WORKER" in os.environ and "pytest" not in sys.modules:
    raise RuntimeError("no licence")
"""


CALLED = "it is called as function(response, answer, metadata) and returns a float"


@pytest.fixture(scope="module")
def custom(tmp_path_factory):
    """A reward module outside the package, importable by its name."""
    folder = tmp_path_factory.mktemp("custom")
    (folder / "custom_rewards.py").write_text(CUSTOM_MODULE)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    yield load_reward_function("custom_rewards:by_command")
    sys.path.remove(str(folder))
    sys.modules.pop("custom_rewards")


@pytest.fixture
def pool(custom):
    pool = RewardPool(custom, num_workers=2, timeout_s=1.0)
    yield pool
    pool.close()


def item(response: str, answer: str = "1", ended: bool = True, **metadata) -> RewardItem:
    return RewardItem(response, answer, metadata, ended)


def boxed(answer: str) -> str:
    return f"Some thought first. The result is $\\boxed{{{answer}}}$."


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


# --- the final answer ---


@pytest.mark.parametrize(
    ("text", "contents"),
    [
        ("no box", None),
        (r"\boxed{6}", "6"),
        (r"\boxed{5} then \boxed{6}.", "6"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {x_{1}} }", "x_{1}"),
        (r"\boxed{6} and \boxed{7", "6"),
        (r"\boxed{\left\{ 1, 2 \right.}", r"\left\{ 1, 2 \right."),
        (r"stray } and { then \boxed{8}", "8"),
        (r"\boxed{a \boxed{b} c}", "b"),
        (r"\boxed{}", ""),
        (r"\boxed 6", None),
    ],
)
def test_last_boxed(text, contents):
    assert last_boxed(text) == contents


def test_last_boxed_takes_linear_time_on_repeated_open_boxes():
    start = time.perf_counter()
    assert last_boxed("\\boxed{" * 100_000) is None
    assert time.perf_counter() - start < 2.0


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        (boxed("42"), "42", 1.0),
        (boxed(" 42 "), "42", 1.0),
        (boxed("43"), "42", 0.0),
        (boxed("-42"), "42", 0.0),
        (boxed("1234"), "1,234", 1.0),
        (boxed("1,234"), "1234", 1.0),
        (boxed("1235"), "1,234", 0.0),
        (boxed("42.0"), "42", 1.0),
        (boxed("0.5"), r"\frac{1}{2}", 1.0),
        (boxed(r"\dfrac12"), r"\frac{1}{2}", 1.0),
        (boxed(r"\frac{2}{3}"), r"\frac{1}{2}", 0.0),
        (boxed("1+x^2"), "x^2+1", 1.0),
        (boxed("x^2-1"), "x^2+1", 0.0),
        (boxed(r"70\%"), r"70\%", 1.0),
        (boxed("0.7"), r"70\%", 1.0),
        (boxed(r"71\%"), r"70\%", 0.0),
        (boxed(r"18 \text{ dollars}"), "18", 1.0),
        (boxed(r"\$18"), "18", 1.0),
        (boxed("18, 19"), "18", 0.0),
        (boxed("18 or 19"), "18", 0.0),
        (boxed(r"3 \times 10^8"), "3e8", 1.0),
        (boxed("300000000"), "3e8", 1.0),
        (boxed("3e7"), "3e8", 0.0),
        (boxed("4.3e-19"), "2.9e-19", 0.0),
        (boxed(".5"), "0.5", 1.0),
        (boxed(r"4.3 \times 10^{-19}"), "2.9e-19", 0.0),
        (boxed(r"2.9 \cdot 10^{-19}"), "2.9e-19", 1.0),
        (boxed(r"3 \times 10^{8} m"), "3e8", 1.0),
        (boxed("10^{2}"), "100", 1.0),
        (boxed("1.6e-3"), "0.0016", 1.0),
        (boxed(r"\{2, 1\}"), r"\{1, 2\}", 1.0),
        (boxed("(1,2)"), "(2,1)", 0.0),
        (boxed("42"), r"\boxed{42}", 1.0),
        (boxed("42"), "$42$", 1.0),
        (boxed("7") + " No: " + boxed("42"), "42", 1.0),
        (boxed("42") + " No: " + boxed("7"), "42", 0.0),
        (r"\boxed{}", "42", 0.0),
        ("", "42", 0.0),
        ("The answer is 42.", "42", 1.0),
        ("The answer is 43.", "42", 0.0),
        ("I do not know.", "42", 0.0),
        ("The answer is 42. " + "and so on " * 200, "42", 0.0),  # not in the end of the response
        ("and so on " * 200 + "The answer is 42.", "42", 1.0),
        ("1" * 5000, "1", 0.0),
        (boxed("1+" * 600 + "1"), "601", 0.0),  # longer than any final answer
        (boxed(r"\frac{1}{"), "1", 0.0),
    ],
)
def test_math_reward(response, answer, reward):
    assert math_reward(response, answer, {}) == reward


def test_a_number_that_the_tail_cuts_is_not_the_answer():
    # The last 1,000 characters begin with the 7 of 97.
    assert math_reward("w" * 50 + " 97" + " yes" * 249 + "...", "7") == 0.0
    assert math_reward("w" * 50 + " 7" + " yes" * 240, "7") == 1.0


@given(st.integers(-(10**9), 10**9), st.integers(-2, 2), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_number_shortcut_agrees_with_math_verify(reference, offset, commas, reference_commas):
    found = f"{reference + offset:,}" if commas else f"{reference + offset}.0"
    gold = f"{reference:,}" if reference_commas else str(reference)
    assert math_reward(boxed(found), gold) == by_math_verify(found, gold) == float(offset == 0)


def by_math_verify(found: str, gold: str) -> float:
    return math_rewards._grade(math_rewards._parse_answer(found), math_rewards._parse_answer(gold))


def test_grade_is_cached():
    math_rewards._grade_answer.cache_clear()
    for _ in range(3):
        assert math_reward(boxed("x+x"), "2x") == 1.0
    info = math_rewards._grade_answer.cache_info()
    assert (info.misses, info.hits) == (1, 2)


def test_math_reward_works_outside_the_main_thread():
    rewards = []
    thread = threading.Thread(target=lambda: rewards.append(math_reward(boxed("y+y"), "2y")))
    thread.start()
    thread.join(timeout=30)
    assert rewards == [1.0]


def read_answers(name: str, key: str, pattern: str = "(.+)") -> list[str]:
    lines = (DATA / name).read_text(encoding="utf-8").splitlines()
    return [re.search(pattern, str(json.loads(line)[key])).group(1).strip() for line in lines]


@pytest.mark.skipif(not DATA.is_dir(), reason="real problems not here: ../shared/data")
@pytest.mark.parametrize(
    ("name", "key", "count"),
    [
        ("gsm8k/test.jsonl", "answer", 1319),
        ("math_eval/aime24.jsonl", "answer", 30),
        ("math_eval/amc23.jsonl", "answer", 40),
        ("math_eval/svamp.jsonl", "Answer", 1000),
        ("math_eval/mawps_singleop.jsonl", "target", 562),
        ("math_eval/mawps_addsub.jsonl", "target", 395),
        ("math_eval/mawps_multiarith.jsonl", "target", 600),
    ],
)
def test_real_references_grade_themselves_and_refuse_a_neighbour(name, key, count):
    answers = read_answers(name, key, r"####\s*(.+)" if "gsm8k" in name else "(.+)")
    assert len(answers) == count
    assert [a for a in answers if math_reward(boxed(a), a) != 1.0] == []
    assert [a for a in answers if by_math_verify(a, a) != 1.0] == []
    assert [a for a in answers if math_reward(boxed(f"{float(a.replace(',', '')) + 1:.5f}"), a) != 0.0] == []
    assert [a for a in answers if math_reward(f"The answer is {a}.", a) != 1.0] == []


@pytest.mark.skipif(not DATA.is_dir(), reason="real problems not here: ../shared/data")
def test_real_latex_references_grade_themselves_with_other_spacing():
    lines = (DATA / "math_eval/minerva_math.jsonl").read_text(encoding="utf-8").splitlines()
    solutions = [json.loads(line)["solution"] for line in lines]
    references = [last_boxed(solution) for solution in solutions]
    assert len(references) == 272
    assert [r for r, s in zip(references, solutions, strict=True) if math_reward(s, r) != 1.0] == []
    plain = [r for r in references if re.fullmatch(r"-?\d+(\.\d+)?(e-?\d+)?", r)]
    assert len(plain) > 150
    assert [r for r in plain if math_reward(boxed(f"{float(r) * 1.5!r}"), r) != (float(r) == 0.0)] == []


# --- loading ---


def test_load_reward_function_names(custom):
    assert load_reward_function("math") is math_reward
    assert custom.__module__ == "custom_rewards"
    assert load_reward_function("custom_rewards:partial")("", "", {}) == 1.0


@pytest.mark.parametrize(
    ("import_path", "message"),
    [
        ("maths", """reward function 'maths': write "math" or "package.module:function\""""),
        ("a.b:", """reward function 'a.b:': write "math" or "package.module:function\""""),
        (
            "no_such_module:f",
            "reward function 'no_such_module:f': cannot import no_such_module "
            "(No module named 'no_such_module'); PYTHONPATH must hold its folder, "
            "the current one is not searched",
        ),
        ("custom_rewards:f", "reward function 'custom_rewards:f': custom_rewards has no 'f'"),
        ("custom_rewards:CONSTANT", "reward function 'custom_rewards:CONSTANT': is a int, not a function"),
        (
            "custom_rewards:compute_score",
            "reward function 'custom_rewards:compute_score': compute_score(solution_str, ground_truth) "
            f"does not fit (too many positional arguments); {CALLED}",
        ),
        ("custom_rewards:later", f"reward function 'custom_rewards:later': is async; {CALLED}"),
        (
            "custom_rewards:Scored",
            f"reward function 'custom_rewards:Scored': is a class, not a function; {CALLED}",
        ),
    ],
)
def test_load_reward_function_errors(custom, import_path, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load_reward_function(import_path)


def test_function_that_no_worker_could_import():
    with pytest.raises(ValueError, match="must be defined at the top of a module"):
        RewardPool(lambda response, answer, metadata: 1.0, num_workers=1, timeout_s=1.0)

    def local(response, answer, metadata):
        return 1.0

    local.__module__ = "__main__"
    with pytest.raises(ValueError, match="defined in the main program: move it to a module of its own"):
        RewardPool(local, num_workers=1, timeout_s=1.0)


def test_function_that_fails_to_load_in_the_worker(custom, monkeypatch):
    monkeypatch.setenv("FAIL_IN_WORKER", "1")
    pool = RewardPool(custom, num_workers=1, timeout_s=1.0)
    with pytest.raises(RuntimeError, match="cannot load the reward function: RuntimeError: no licence"):
        pool.score([item("is 1")])
    pool.close()


# --- the pool ---


def test_scores_come_back_in_order(pool):
    items = [item(f"is {i % 3}", "1", bonus=i) for i in range(300)]
    assert pool.score(items) == [RewardResult(float(i % 3 == 1) + i, "ok", "") for i in range(300)]
    assert pool.score([]) == []


def test_response_that_did_not_end_earns_nothing_and_is_not_run(pool):
    results = pool.score([item("exit 3", ended=False), item("is 1", ended=False), item("is 1")])
    cut = RewardResult(0.0, "ok", "the response did not end")
    assert results == [cut, cut, RewardResult(1.0, "ok", "")]


@pytest.mark.long
@pytest.mark.parametrize("command", ["hang", "hang_in_c"])
def test_hanging_item_costs_only_itself(pool, command):
    items = [item("is 1") for _ in range(200)]
    items[50] = items[51] = item(command)
    start = time.monotonic()
    results = pool.score(items)
    assert time.monotonic() - start < 10.0
    late = RewardResult(0.0, "timeout", "no reward within 1 s")
    assert [i for i, result in enumerate(results) if result == late] == [50, 51]
    assert sum(result == RewardResult(1.0, "ok", "") for result in results) == 198


@pytest.mark.long
def test_deadline_is_for_each_item_not_for_the_chunk(custom):
    pool = RewardPool(custom, num_workers=1, timeout_s=0.5)
    assert pool.score([item("slow 0.2")] * 12) == [RewardResult(0.0, "ok", "")] * 12  # chunks of three
    pool.close()


def test_dying_worker_costs_only_its_item_and_is_replaced(pool):
    items = [item("is 1") for _ in range(40)]
    items[0] = item("exit 3")
    items[20] = item("sys_exit")
    results = pool.score(items)
    assert results[0] == RewardResult(0.0, "error", "the reward function ended its process, exit status 3")
    assert results[20] == RewardResult(0.0, "error", "the reward function ended its process, exit status 4")
    assert sum(result == RewardResult(1.0, "ok", "") for result in results) == 38


def test_a_response_that_takes_too_much_memory_costs_only_itself(custom):
    pool = RewardPool(custom, num_workers=2, timeout_s=10.0, memory_gb=0.5)
    items = [item("is 1") for _ in range(40)]
    items[7] = item("allocate 0.75")
    items[30] = item("allocate 0.25")
    results = pool.score(items)
    pool.close()
    too_much = RewardResult(0.0, "error", "the reward function ran out of memory, see --reward-memory-gb")
    assert results[7] == too_much
    assert results[30] == RewardResult(0.25, "ok", "")
    assert results.count(RewardResult(1.0, "ok", "")) == 38


def test_memory_that_a_function_keeps_goes_with_its_worker(custom):
    pool = RewardPool(custom, num_workers=1, timeout_s=10.0, memory_gb=0.5)
    results = pool.score([item("keep 0.15")] * 8)
    pool.close()
    assert [result.value for result in results] == [1.0, 2.0, 3.0, 0.0, 1.0, 2.0, 3.0, 0.0]
    assert [result.status for result in results].count("error") == 2


def test_a_worker_killed_while_idle_costs_nothing(pool):
    pids = {int(result.value) for result in pool.score([item("pid")] * 64)}
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: not any(map(is_alive, pids)), 5.0)
    assert pool.score([item("is 1")] * 8) == [RewardResult(1.0, "ok", "")] * 8


@pytest.mark.parametrize(
    ("response", "detail"),
    [
        ("raise it", "KeyError: 'it'"),
        ("return 'one'", "the reward function returned a str, not a number"),
        ("return None", "the reward function returned a NoneType, not a number"),
        ("return float('nan')", "the reward function returned nan"),
        ("return float('-inf')", "the reward function returned -inf"),
        ("return 1e39", "the reward function returned 1e+39, more than a float32 can hold"),
        ("return __import__('numpy').zeros(2)", "the reward function returned a ndarray, not a number"),
        ("return 10**400", "OverflowError: int too large to convert to float"),
    ],
)
def test_bad_results_are_errors_with_a_reason(pool, response, detail):
    assert pool.score([item(response), item("return True"), item("return 0.25")]) == [
        RewardResult(0.0, "error", detail),
        RewardResult(1.0, "ok", ""),
        RewardResult(0.25, "ok", ""),
    ]


@pytest.mark.parametrize(
    "value",
    ["np.bool_(True)", "np.array(1)", "np.array(True)", "np.float32(1)", "np.int64(1)", "np.float64(1)"],
)
def test_scalars_of_numpy_are_numbers(custom, value):
    pool = RewardPool(custom, num_workers=1, timeout_s=20.0)
    results = pool.score([item("return " + value.replace("np", "__import__('numpy')"))])
    pool.close()
    assert results == [RewardResult(1.0, "ok", "")]


def test_a_batch_in_which_every_reward_failed_is_refused(pool):
    class Words:
        def batch_decode(self, token_ids, skip_special_tokens):
            return [WORDS[ids[0]] for ids in token_ids]

    WORDS = ["raise it", "is 1"]
    scorer = Scorer(Words(), pool, 8, 0, 1.0)

    def batch(*numbers):
        prompt = Prompt(0, [1], "1", "question", {})
        return [
            SimpleNamespace(token_ids=[n], prompt=prompt, finish_reason="stop", reward_status="")
            for n in numbers
        ]

    some, none = batch(0, 1), batch(0, 0)
    scorer.score(some)
    check_some_worked(reward_statuses(some))
    why = describe_failures(scorer.score(none))
    with pytest.raises(RuntimeError, match="all 2 rewards of a batch failed: .*KeyError: 'it'"):
        check_some_worked(reward_statuses(none), why)


def test_batches_from_several_threads_do_not_mix(pool):
    outcomes = {}

    def score(bonus: int) -> None:
        outcomes[bonus] = {result.value for result in pool.score([item("is 1", bonus=bonus)] * 50)}

    threads = [threading.Thread(target=score, args=(bonus,)) for bonus in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert outcomes == {bonus: {1.0 + bonus} for bonus in range(4)}


@pytest.mark.long  # its bound wants a processor of its own
def test_512_cheap_items_take_well_under_half_a_second():
    pool = RewardPool(math_reward, num_workers=2, timeout_s=30.0)
    pool.score([RewardItem(boxed("7"), "42", {}, True)] * 64)
    items = [RewardItem("step " * 2000 + boxed(str(i)), "42", {}, True) for i in range(512)]
    fastest = float("inf")
    for _ in range(3):  # the best of three: the machine may be busy
        start = time.perf_counter()
        results = pool.score(items)
        fastest = min(fastest, time.perf_counter() - start)
    pool.close()
    assert [i for i, result in enumerate(results) if result.value == 1.0] == [42]
    assert fastest < 0.5


@pytest.mark.long
def test_sympy_power_tower_meets_the_deadline():
    pool = RewardPool(math_reward, num_workers=1, timeout_s=1.0)
    pool.score([RewardItem(boxed("x"), "42", {}, True)])  # the first LaTeX parse is slow
    tower = RewardItem(boxed("9^{9^{9^9}}"), "42", {}, True)
    results = pool.score([tower, RewardItem(boxed("42"), "42", {}, True)])
    pool.close()
    assert [(result.value, result.status) for result in results] == [(0.0, "timeout"), (1.0, "ok")]


# --- the end ---


def test_close_kills_busy_workers_and_what_they_started(custom):
    pool = RewardPool(custom, num_workers=1, timeout_s=1.0)
    (result,) = pool.score([item("pid")])
    marker = f"marker-{os.getpid()}"
    assert pool.score([item(f"hang_with_child {marker}")])[0].status == "timeout"
    assert not is_alive(int(result.value))
    assert wait_until(lambda: not processes_with(marker), 5.0)
    replacement = int(pool.score([item("pid")])[0].value)
    assert is_alive(replacement)
    pool.close()
    assert not is_alive(replacement)
    with pytest.raises(RuntimeError, match="the reward pool is closed"):
        pool.score([item("is 1")])


def processes_with(argument: str) -> list[str]:
    return [
        path.parent.name for path in Path("/proc").glob("[0-9]*/cmdline") if argument in read_or_empty(path)
    ]


def read_or_empty(path: Path) -> str:
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


DRIVER = """
import sys, time
import threading
from megatron_vespo.rewards.pool import RewardItem, RewardPool, load_reward_function
function = load_reward_function("custom_rewards:by_command")
pool = RewardPool(function, num_workers=1, timeout_s=float(sys.argv[1]))
print(int(pool.score([RewardItem("pid", "", {}, True)])[0].value), flush=True)
for response in sys.argv[2:]:
    pool.score([RewardItem(response, "", {}, True)])
"""


def start_driver(custom, *arguments: str) -> tuple[subprocess.Popen, int]:
    folder = Path(sys.modules[custom.__module__].__file__).parent
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{folder}"},
    )
    return process, int(process.stdout.readline())


def test_nothing_is_left_after_interpreter_exit(custom):
    process, worker = start_driver(custom, "5")
    assert process.wait(timeout=20) == 0
    assert wait_until(lambda: not is_alive(worker), 5.0)


@pytest.mark.long
def test_killed_parent_leaves_no_worker_not_even_a_hung_one(custom):
    process, worker = start_driver(custom, "1.5", "hang_in_c")
    time.sleep(0.5)
    process.kill()
    process.wait(timeout=10)
    time.sleep(0.2)
    assert is_alive(worker)  # it hangs, so the end of its pipe goes unseen
    assert wait_until(lambda: not is_alive(worker), 10.0)


def test_workers_stay_light():
    """Importing the math reward and the pool loads no training stack, whatever the main program holds."""
    code = (
        "import sys, megatron_vespo.rewards.math, megatron_vespo.rewards.pool;"
        "print(sorted({'torch', 'numpy', 'ray', 'sglang', 'megatron', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=REPOSITORY, check=True
    )
    assert json.loads(done.stdout.replace("'", '"')) == []


def test_workers_do_not_import_the_main_program(custom, tmp_path):
    main = tmp_path / "main.py"
    main.write_text(DRIVER.replace("import threading", "print('main imported', flush=True)"))
    folder = Path(sys.modules[custom.__module__].__file__).parent
    done = subprocess.run(
        [sys.executable, str(main), "5"],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{folder}"},
        check=True,
    )
    assert done.stdout.count("main imported") == 1
