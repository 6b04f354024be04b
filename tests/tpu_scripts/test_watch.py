"""watch.sh through preemptions, with a training command that a test scripts attempt by attempt."""

import os
import signal
import time

import pytest


@pytest.fixture
def watched(cloud):
    """watch(plan, settings) → the finished watch.sh; a plan has a line of shell for each attempt."""
    cloud.put("workers", "1")

    def start(*plan, arguments=(), **settings):
        cloud.settings(TPU_BUCKET="", **settings)
        cloud.put("plan", "\n".join(plan) + "\n")
        return cloud.start("watch", *arguments, "--", *COMMAND)

    def watch(*plan, **settings):
        process = start(*plan, **settings)
        process.out, process.err = process.communicate(timeout=60)
        return process

    watch.start = start
    return watch


COMMAND = ["bash", "-c", 'echo x >> "$CLOUD/attempts"; eval "$(sed -n "$(wc -l < "$CLOUD/attempts")p" "$CLOUD/plan")"']
PREEMPTED = 'echo SUSPENDED > "$CLOUD/taken"; exit 75'
ROUND = [
    "create",
    "scp",
    "ssh",
    "ssh",
    "ssh",
    "ssh",
    "ssh",
    "ssh",
    "ssh",
]  # install; smoke and run: start, follow, code


def waits(cloud):
    return [int(line) for line in cloud.text("slept").split() if line.isdigit()]


def test_a_preempted_run_is_resumed_on_a_new_pod(cloud, watched):
    done = watched(PREEMPTED, "exit 0", TPU_BACKOFF_SECONDS="7")
    assert done.returncode == 0, done.out + done.err
    assert cloud.verbs() == [*ROUND, "delete", *ROUND]
    assert waits(cloud) == [7]
    assert "ended with exit code 0 after 1 restarts" in done.out
    assert "costs money until delete.sh" in done.err
    assert not list((cloud.logs / "pod").glob("watch*"))


def test_waits_grow_up_to_the_cap(cloud, watched):
    done = watched(*[PREEMPTED] * 4, "exit 0", TPU_BACKOFF_SECONDS="20", TPU_BACKOFF_MOST="50")
    assert done.returncode == 0, done.err
    assert waits(cloud) == [20, 40, 50, 50]


def test_a_pod_that_is_still_there_after_a_save_is_used_again(cloud, watched):
    done = watched("exit 75", "exit 0", arguments=["--delete"])
    assert done.returncode == 0
    assert cloud.verbs() == [*ROUND, *ROUND[1:], "delete"]
    assert waits(cloud) == [30]


def test_workers_that_lost_each_other_are_started_again_but_not_for_ever(cloud, watched):
    done = watched("exit 71", "exit 0")
    assert done.returncode == 0 and cloud.verbs().count("create") == 1
    (cloud.folder / "attempts").unlink()
    done = watched(*["exit 134"] * 9, TPU_BACKOFF_SECONDS="1")
    assert done.returncode == 71 and cloud.text("attempts").count("x") == 4


@pytest.mark.parametrize("code", [1, pytest.param(70, marks=pytest.mark.slow), 73, 137])
def test_a_failure_is_returned_and_not_tried_again(cloud, watched, code):
    done = watched(f"exit {code}", "exit 0")
    assert done.returncode == code and ("another run writes to this --out" in done.err) == (code == 73)
    assert cloud.text("attempts").count("x") == 1 and waits(cloud) == []


def test_a_worker_killed_by_preemption_is_tried_again(cloud, watched):
    """ssh fails and the node says PREEMPTED, before the queued resource does."""
    lost = 'printf PREEMPTED > "$CLOUD/node_state"; echo ACTIVE > "$CLOUD/taken"; kill -KILL $$'
    again = 'rm "$CLOUD/node_state"; exit 0'
    done = watched.start(lost, again)
    while "restart 1 in" not in (line := done.stdout.readline()):
        assert line, done.stderr.read()
    (cloud.folder / "node_state").unlink()
    (cloud.folder / "plan").write_text("\nexit 0\n")
    assert done.wait(60) == 0, done.stderr.read()
    verbs = cloud.verbs()
    assert verbs.count("create") == 2 and verbs.count("delete") == 1


def test_a_code_that_cannot_be_asked_for_any_more(cloud, watched):
    done = watched('echo SUSPENDED > "$CLOUD/taken"; exit 2', "exit 0")
    assert done.returncode == 0 and cloud.text("attempts").count("x") == 2


def test_preempted_while_it_was_set_up(cloud, watched):
    cloud.put("smoke.0.0", "1")
    cloud.put("lives", "ACTIVE SUSPENDED\nACTIVE")
    process = watched.start("exit 0")
    while "restart 1 in" not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    (cloud.folder / "smoke.0.0").unlink()
    assert process.wait(60) == 0, process.stderr.read()
    assert cloud.verbs().count("create") == 2


def test_a_setup_that_fails_on_a_healthy_pod_is_the_end(cloud, watched):
    cloud.put("smoke.0.0", "9")
    done = watched("exit 0")
    assert done.returncode == 9 and "attempts" not in os.listdir(cloud.folder)


def test_a_request_that_failed_is_the_end(cloud, watched):
    cloud.put("lives", "WAITING_FOR_RESOURCES FAILED")
    done = watched("exit 0")
    assert done.returncode == 1 and "no capacity left" in done.err
    assert cloud.verbs() == ["create"]
    assert "the request pod FAILED: it costs nothing, and delete.sh removes it" in done.err
    assert "costs money until" not in done.err


def test_a_request_suspended_in_the_queue_is_made_again(cloud, watched):
    cloud.put("lives", "WAITING_FOR_RESOURCES SUSPENDED\nACTIVE")
    done = watched("exit 0")
    assert done.returncode == 0, done.err
    assert cloud.verbs() == ["create", "delete", *ROUND]


def test_gcloud_that_fails_to_create(cloud, watched):
    cloud.put("fails", "create 6 1 calls")
    done = watched("exit 0")
    assert done.returncode == 6 and cloud.verbs() == ["create"]
    assert "there is no pod: nothing costs money" in done.err and "is still there" not in done.err


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("ABSENT", "there is no pod: nothing costs money"),
        ("SUSPENDED", "the machines of pod were taken away (SUSPENDED): delete.sh removes the request"),
        ("DELETING", "pod is being deleted"),
        ("WAITING_FOR_RESOURCES", "is still in the queue (WAITING_FOR_RESOURCES): it costs money once it is ACTIVE"),
        ("ACTIVE", "the TPU pod is still there and costs money until delete.sh"),
    ],
)
def test_what_is_left_at_the_end(cloud, watched, state, words):
    """Whatever becomes of the TPU while the command ends well."""
    done = watched(f'echo {state} > "$CLOUD/then"; exit 0')
    assert done.returncode == 0 and words in done.err
    assert ("is still there" in done.err) == (state == "ACTIVE")


@pytest.mark.parametrize(
    ("states", "slices", "words"),
    [
        ("READY PREEMPTED", 2, "1 of 2 slices of pod are still there and cost money until delete.sh"),
        ("ABSENT READY", 3, "2 of 3 slices of pod are still there and cost money until delete.sh"),
        ("TERMINATED STOPPED REPAIRING", 3, "1 of 3 slices of pod are still there and cost money until delete.sh"),
        ("PREEMPTED", 2, "the machines of pod were taken away (PREEMPTED): delete.sh removes the request"),
        ("PREEMPTED", 1, "the machines of pod were taken away (PREEMPTED): delete.sh removes the request"),
    ],
)
def test_slices_that_are_left_are_counted(cloud, watched, states, slices, words):
    """Some are taken away while the command ends well."""
    line = f'echo {states} > "$CLOUD/node_state"; exit 0'
    done = watched(*[line] * slices, TPU_SLICES=str(slices))  # a worker of each slice counts as an attempt
    assert done.returncode == 0 and words in done.err
    assert ("cost money" in done.err) == ("cost money" in words)


def test_gcloud_that_does_not_say_what_is_left(cloud, watched):
    done = watched('echo "list 7 99 calls" > "$CLOUD/fails"; exit 0')
    assert done.returncode == 0 and "gcloud does not say whether pod is there: it may cost money" in done.err


def test_gcloud_that_cannot_be_asked_for_long(cloud, watched):
    """The request stays in the queue meanwhile, and would cost money unwatched."""
    cloud.put("lives", "WAITING_FOR_RESOURCES WAITING_FOR_RESOURCES ACTIVE")
    cloud.put("fails", "list 1 13 request")
    done = watched("exit 0", TPU_BACKOFF_SECONDS="7", TPU_BACKOFF_MOST="9")
    assert done.returncode == 0, done.err
    assert cloud.verbs() == ["create", *ROUND[1:]] and "gcloud does not say whether pod is there" in done.err


def test_workers_that_cannot_be_reached_for_long_are_not_given_up(cloud, watched):
    process = watched.start('printf pod/0 > "$CLOUD/unreachable"; exit 0', arguments=["--delete"])
    while cloud.text("calls").count("worker.sh follow") < 9:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    (cloud.folder / "unreachable").unlink()
    assert process.wait(60) == 0, process.stderr.read()
    assert cloud.text("attempts") == "x\n" and cloud.verbs().count("create") == 1


def test_a_budget_used_up_before_the_command_begins(cloud, watched):
    done = watched("exit 0", TPU_MAX_HOURS="9", TPU_SETUP='echo 40000 > "$CLOUD/later"')
    assert done.returncode == 75 and "of TPU time is used up" in done.err
    assert not cloud.text("attempts") and not (cloud.folder / "request").exists()


def test_the_most_restarts(cloud, watched):
    done = watched(*[PREEMPTED] * 9, TPU_MAX_RESTARTS="1", TPU_BACKOFF_SECONDS="1")
    assert done.returncode == 75 and "the budget is used up after 1 restarts" in done.err
    assert cloud.verbs().count("create") == 2 and not (cloud.folder / "request").exists()


# The command lets nine hours and more go by.
LATE = "echo 40000 > $CLOUD/later; "


@pytest.mark.parametrize(
    "limit", [{"TPU_MAX_HOURS": "11"}, {"TPU_MAX_HOURS": "20", "TPU_MAX_DOLLARS": "900", "TPU_DOLLARS_PER_HOUR": "100"}]
)
def test_money_saves_and_deletes(cloud, watched, limit):
    """When the budget is used up, the command is told to save, and the pod goes."""
    plan = LATE + 'trap "echo saved >> $CLOUD/kept; exit 75" TERM; while [ -e $CLOUD/request ]; do sleep 0.1; done'
    done = watched(plan, plan, **limit)
    assert done.returncode == 75 and "of TPU time is used up" in done.err
    assert cloud.text("attempts") == "x\n" and cloud.text("kept") == "saved\n"
    assert cloud.verbs()[-1] == "delete" and not (cloud.folder / "request").exists()


def test_a_command_that_does_not_save_is_not_waited_for_forever(cloud, watched):
    plan = LATE + 'trap "" TERM; while [ -e $CLOUD/request ]; do sleep 0.1; done'
    done = watched(plan, TPU_MAX_HOURS="9", TPU_STOP_SECONDS="1")
    assert done.returncode == 75 and "not ended 1 s after SIGTERM" in done.err
    assert not (cloud.folder / "request").exists()


@pytest.mark.parametrize(
    ("handler", "code"), [("-", 75), ("exit 71", 75), ("exit 137", 75), ("exit 0", 0), ("exit 1", 1)]
)
def test_the_code_of_a_command_that_the_budget_ends(cloud, watched, handler, code):
    """75 where it heard nothing, was killed or lost the others; what it has to say for itself stays."""
    plan = LATE + f'trap "{handler}" TERM; while [ -e $CLOUD/request ]; do sleep 0.1; done'
    done = watched(plan, TPU_MAX_HOURS="9")
    assert done.returncode == code and not (cloud.folder / "request").exists()


def test_killed_and_started_again_creates_nothing_twice(cloud, watched):
    plan = 'while [ ! -e "$CLOUD/go" ]; do sleep 0.05; done; exit 0'
    for how in (signal.SIGKILL, signal.SIGTERM):
        process = watched.start(plan)
        pid_file = cloud.logs / "pod/watch.pid"
        while not (
            cloud.text("attempts") and pid_file.exists() and pid_file.read_text().split()[0] == str(process.pid)
        ):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        second = cloud("watch", "--", *COMMAND)
        assert second.returncode == 2 and f"{process.pid} watches pod already" in second.stderr
        assert second.stderr.endswith(f"delete {pid_file}\n") and "going on" not in second.stdout
        time.sleep(0.5)
        os.kill(process.pid, how)
        process.wait(20)
        if how == signal.SIGTERM:
            assert process.returncode == 130
    other = cloud("watch", "--", "true")
    assert other.returncode == 2 and "is watched for another command" in other.stderr
    process = watched.start(plan)
    time.sleep(0.5)
    cloud.put("go", "")
    assert process.wait(60) == 0, process.stderr.read()
    assert "going on: 0 restarts" in process.stdout.read()
    verbs = cloud.verbs()
    assert verbs.count("create") == 1 and verbs.count("scp") == 1 and cloud.text("attempts").count("x") == 1


@pytest.mark.parametrize("text", ["{pid}\n1\n", "{pid} \n12345 6\n", "-1\n", "0", "abc", "", "999999999999\n5\n"])
def test_a_stale_number_does_not_block(cloud, watched, text):
    """A living process of the same number that began at another time, and what is no number."""
    (cloud.logs / "pod").mkdir(parents=True)
    (cloud.logs / "pod/watch.pid").write_text(text.format(pid=os.getpid()))
    cloud.put("fails", "create 6 1 calls")  # which is the end
    done = watched("exit 0")
    assert done.returncode == 6 and cloud.verbs() == ["create"], done.err
    assert ("is now that of another" in done.out) == ("{pid}" in text)


def test_a_number_without_a_time_names_its_file(cloud, watched):
    (cloud.logs / "pod").mkdir(parents=True)
    file = cloud.logs / "pod/watch.pid"
    file.write_text(str(os.getpid()))
    done = watched("exit 0")
    assert done.returncode == 2 and f"if it does something else, delete {file}" in done.err
    assert not cloud.calls() and file.read_text() == str(os.getpid())


def test_a_variable_without_a_value_is_found_before_anything_is_asked_for(cloud, watched):
    done = watched("exit 0", TPU_PASS="NOT_THERE")
    assert done.returncode == 2 and "TPU_PASS names NOT_THERE, which has no value here" in done.err
    assert not cloud.calls()


def test_the_budget_is_counted_on(cloud, watched):
    process = watched.start(*[PREEMPTED] * 5, TPU_BACKOFF_SECONDS="1", TPU_MAX_RESTARTS="2")
    while "restart 1 in" not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    os.kill(process.pid, signal.SIGKILL)
    process.wait(10)
    time.sleep(1)
    done = watched(*[PREEMPTED] * 9, TPU_BACKOFF_SECONDS="1", TPU_MAX_RESTARTS="2")
    assert "going on: 1 restarts" in done.out and "after 2 restarts" in done.out
    assert done.returncode == 75 and cloud.text("attempts").count("x") == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"TPU_MAX_DOLLARS": "9"}, "TPU_MAX_DOLLARS needs TPU_DOLLARS_PER_HOUR"),
        ({"TPU_MAX_HOURS": "two"}, "TPU_MAX_HOURS 'two': a number"),
        ({"TPU_MAX_RESTARTS": "-1"}, "TPU_MAX_RESTARTS '-1': a whole number"),
        ({"TPU_MAX_RESTARTS": "08"}, "TPU_MAX_RESTARTS '08': a whole number"),
        ({"TPU_STOP_SECONDS": "9" * 30}, "a whole number"),
        ({"TPU_POLL_SECONDS": "abc"}, "TPU_POLL_SECONDS 'abc': a number of seconds above 0"),
        ({"TPU_POLL_SECONDS": "0.0"}, "TPU_POLL_SECONDS '0.0': a number of seconds above 0"),
    ],
)
def test_bad_limits(cloud, watched, settings, message):
    done = watched("exit 0", **settings)
    assert done.returncode == 2 and message in done.err and not cloud.calls()
