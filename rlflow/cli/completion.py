"""`rlflow completion`: what a shell needs to complete commands, options and keys of the recipe."""

from __future__ import annotations

import argparse
import os

from rlflow.cli.common import parser_of
from rlflow.cli.suggestions import SEPARATOR, WORDS, suggest

SUMMARY = "print a script with which bash, zsh or fish complete commands, options and keys of recipes"

BASH = f"""\
_rlflow() {{
    local line="${{COMP_LINE:0:COMP_POINT}}" words=() place IFS=$' \\t\\n'
    # Without -r, a backslash keeps a space within its word.
    read -a words <<< "$line"
    [[ "$line" == *[[:space:]] && "$line" != *\\\\[[:space:]] ]] && words+=("")
    local current="${{words[-1]}}" joined
    printf -v joined '%s{SEPARATOR}' "${{words[@]:1}}"
    mapfile -t COMPREPLY < <({WORDS}="$joined" "${{words[0]}}" completion suggest 2>/dev/null)
    [[ -z "${{COMPREPLY[0]}}" ]] && COMPREPLY=()
    # bash takes what follows an equals sign for a word of its own.
    [[ "$current" == *=* ]] && COMPREPLY=("${{COMPREPLY[@]#"${{current%%=*}}="}}")
    for place in "${{!COMPREPLY[@]}}"; do printf -v "COMPREPLY[place]" %q "${{COMPREPLY[place]}}"; done
    [[ ${{#COMPREPLY[@]}} -eq 1 && "${{COMPREPLY[0]}}" == *[.=] ]] && compopt -o nospace
    return 0
}}
complete -o default -F _rlflow rlflow
"""
ZSH = f"""\
#compdef rlflow
_rlflow() {{
    local joined
    printf -v joined '%s{SEPARATOR}' "${{(@)words[2,CURRENT]}}"
    local -a found
    found=("${{(@f)$({WORDS}="$joined" "$words[1]" completion suggest 2>/dev/null)}}")
    found=(${{found:#}})
    if (( ${{#found}} )); then
        compadd -S '' -- ${{(M)found:#*[.=]}}
        compadd -- ${{found:#*[.=]}}
    else
        _files
    fi
}}
compdef _rlflow rlflow
"""
FISH = f"""\
function __rlflow_suggest
    set -l words (commandline -opc) (commandline -ct)
    set -lx {WORDS} (string join -- '{SEPARATOR}' $words[2..-1])'{SEPARATOR}'
    $words[1] completion suggest 2>/dev/null
end
complete -c rlflow -a '(__rlflow_suggest)'
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


def make_parser() -> argparse.ArgumentParser:
    example = (
        "rlflow completion fish > ~/.config/fish/completions/rlflow.fish\n"
        '  eval "$(rlflow completion bash)"                              # in ~/.bashrc\n'
        '  eval "$(rlflow completion zsh)"                               # in ~/.zshrc, behind compinit'
    )
    parser = parser_of("completion", SUMMARY, example)
    words = ", ".join(SCRIPTS)
    parser.add_argument(
        "shell", metavar="SHELL", choices=[*SCRIPTS, "suggest"], help=f"{words}; suggest is what the scripts call"
    )
    return parser


def execute(arguments: argparse.Namespace) -> int:
    if arguments.shell == "suggest":
        print("\n".join(suggest(os.environ.get(WORDS, "").split(SEPARATOR)[:-1])))
    else:
        print(SCRIPTS[arguments.shell], end="")
    return 0
