"""Scripts are read as a shell reads them, as far as launch scripts go."""

from __future__ import annotations

import pytest

from rlflow.convert.shell import read_commands


def words(script: str) -> list[tuple[str, ...]]:
    return [command.words for command in read_commands(script)]


@pytest.mark.parametrize(
    ("script", "read"),
    [
        ("swift sft --a 1 \\\n  --b 'x y' \\\n  --c \"z\"", ("swift", "sft", "--a", "1", "--b", "x y", "--c", "z")),
        ("M=Qwen/Q\nswift sft --model $M/x ${N:-3} ${M}-b", ("swift", "sft", "--model", "Qwen/Q/x", "3", "Qwen/Q-b")),
        ("n=8; run --ga $(expr 16 / $n) --t $((2 * n))", ("run", "--ga", "2", "--t", "16")),
        ("run --p ${P:-${HOME_OF:-/data}/m} $UNSET", ("run", "--p", "/data/m", "$UNSET")),
        ("run --a 1 # --b 2\n", ("run", "--a", "1")),
        ("nohup run --a 1 > log.txt 2>&1 &", ("nohup", "run", "--a", "1")),
        ("A=(--x 1 # one\n  \"--y=[1,2]\"\n)\nrun \"${A[@]}\" $@", ("run", "--x", "1", "--y=[1,2]")),
        ("F='--x 1 --y 2'\nrun $F", ("run", "--x", "1", "--y", "2")),
        ("swift sft \\      --a 1 \\    --b 2", ("swift", "sft", "--a", "1", "--b", "2")),
        ("swift sft ^\r\n  --a 1 `\n --b 2", ("swift", "sft", "--a", "1", "--b", "2")),
        ("run a.'n'=16 b=['x','y'] &> log.txt", ("run", "a.n=16", "b=[x,y]")),
        ("if true; then\n  run --a 1\nfi", ("run", "--a", "1")),
    ],
)  # fmt: skip
def test_the_words_of_a_command_are_those_that_a_shell_would_give_it(script: str, read: tuple[str, ...]):
    assert read in words(script)


def test_variables_before_a_command_are_its_own_and_those_of_the_script_stay():
    first, second = read_commands("export A=1\nB=2 run\nrun\n")
    assert dict(first.environment) == {"A": "1", "B": "2"}
    assert dict(second.environment) == {"A": "1"}
    assert (first.line, second.line) == (2, 3)


def test_a_comment_is_no_command_and_a_variable_that_names_itself_ends():
    assert words("# swift sft --a 1\n") == []
    assert words('P="$P:/x y"\nrun $P') == [("run", "$P:/x", "y")]


@pytest.mark.parametrize(
    ("script", "broken"),
    [
        ("swift sft\n  --a 1 \\\n  --b 2\nrun", (2,)),
        ("swift sft \\ \n  --a 1 \\\n  --b 2\nrun", (2,)),
        ("swift sft \\\n  --a 1 \\\n  # --c 3 \\\n  --b 2\nrun", (4,)),
        ("swift sft\n--a 1\n--b 2\nrun", (2, 3)),
    ],
)
def test_lines_of_options_without_a_backslash_before_them_belong_to_the_command(script: str, broken: tuple[int, ...]):
    first, second = read_commands(script)
    assert first.words == ("swift", "sft", "--a", "1", "--b", "2") and first.broken == broken
    assert second.words == ("run",) and second.broken == ()


def test_what_nothing_sets_is_known_from_what_is_written_so():
    script = "M=$ROOT/m\nrun --a $M --b \"\\$5 and $X\" --c 'of $5' --d \\$6 --e ${Y:-3} --f $(date +%F) --g ${Z[0]}"
    (command,) = read_commands(script)
    assert command.words[2] == "$ROOT/m" and command.words[4:9] == ("$5 and $X", "--c", "of $5", "--d", "$6")
    assert command.unset == {"$ROOT", "$X", "$(date +%F)", "${Z[0]}"}
