"""The commands that change things: limit, priority and reclaim."""

from __future__ import annotations

import pytest
from click.testing import CliRunner, Result

from tests.broker.controlled import Control
from torch_elastic_mem.cli import main

GiB = 1 << 30


def tem(arguments: str) -> Result:
    return CliRunner().invoke(main, arguments.split())


def test_limit_sends_what_was_given_and_shows_what_is_in_force(control: Control) -> None:
    done = tem("limit chat --min 2GiB --max none --weight 1.5 --device GPU-1")
    assert done.exit_code == 0, done.stderr
    assert control.broker.calls == [("limits", "GPU-1", "chat", {"min": 2 * GiB, "max": None, "weight": 1.5})]
    assert done.stdout == "chat/4712: min 4 GiB, max 60 GiB\n"


def test_a_limit_of_nothing_is_a_limit(control: Control) -> None:
    assert tem("limit chat --low 0 --high 0").exit_code == 0
    assert control.broker.calls == [("limits", None, "chat", {"low": 0, "high": 0})]


def test_priority_says_how_many_moved(control: Control) -> None:
    assert tem("priority fine-tune idle").stdout == "1 account moved to idle\n"
    assert control.broker.calls == [("priority", "fine-tune", "idle")]


@pytest.mark.parametrize(("comes", "code"), [(4 * GiB, 0), (3 * GiB, 1), (0, 1)])
def test_reclaim_exits_with_1_where_less_came_than_was_asked(control: Control, comes: int, code: int) -> None:
    control.broker.comes = comes
    done = tem("reclaim fine-tune 4GiB --timeout 2")
    assert done.exit_code == code
    assert done.stdout == f"{comes // GiB} {'GiB' if comes else 'B'} came of 4 GiB asked\n"
    assert control.broker.calls == [("reclaim", "fine-tune", 4 * GiB, 2.0)]


@pytest.mark.parametrize("arguments", ["limit nobody --min 1", "priority nobody idle", "reclaim nobody 1"])
def test_an_account_that_is_not_there_exits_with_1_and_says_which_are(
    control: Control, arguments: str
) -> None:
    done = tem(arguments)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == "tem: no account 'nobody': there are chat/4712, fine-tune/4711\n"
    assert control.broker.calls == []


def test_what_the_broker_refuses_exits_with_2_and_its_words(control: Control) -> None:
    done = tem("limit chat --min 100GiB")
    assert (done.exit_code, done.stderr) == (2, "tem: asked min 100 GiB, free 78 GiB\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("limit chat", "at least one of --min"),
        ("limit chat --min much", "not a size"),
        ("limit chat --min none", "not a size"),
        ("limit chat --max -1", "not a size"),
        ("limit chat --weight 0", "--weight"),
        ("limit", "NAME"),
        ("priority chat", "CLASS"),
        ("reclaim chat", "BYTES"),
        ("reclaim chat all", "not a size"),
        ("reclaim chat 1GiB --timeout -1", "--timeout"),
        ("top --interval 0", "--interval"),
        ("trace --since -1", "--since"),
    ],
)
def test_bad_input_is_a_usage_error_and_asks_nobody(control: Control, arguments: str, said: str) -> None:
    done = tem(arguments)
    assert done.exit_code == 2
    assert said in done.stderr
    assert control.broker.calls == []
