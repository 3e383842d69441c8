"""Scripts by which a shell completes the command `imagereward`: its commands, their flags, and names of recipes.

eval "$(imagereward --completion bash)"      # in ~/.bashrc; zsh in ~/.zshrc
imagereward --completion fish | source       # in ~/.config/fish/config.fish
"""

import contextlib
import importlib
import io
import re
import sys
from collections.abc import Mapping, Sequence

from imagereward_jax.config import did_you_mean

SHELLS = ("bash", "zsh", "fish")
GLOBAL_FLAGS = ("--help", "--version", "--completion")

_BASH = """\
_imagereward() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}} words="" recipes="{recipes}"
    if [[ $current == "=" ]]; then current=""  # bash takes --config=NAME for three words
    elif [[ $previous == "=" ]]; then previous=${{COMP_WORDS[COMP_CWORD-2]}}; fi
    if [[ $COMP_CWORD -eq 1 ]]; then words="{commands}"
    elif [[ $previous == --config ]]; then words=$recipes
    elif [[ $current == --config=* ]]; then words="--config=${{recipes// / --config=}}"  # zsh takes it for one
    elif [[ $previous == --completion ]]; then words="{shells}"
    elif [[ ${{COMP_WORDS[1]}} == convert && $COMP_CWORD -eq 2 ]]; then words="{conversions}"
    elif [[ $current == -* ]]; then
        case ${{COMP_WORDS[1]}} in
{cases}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o bashdefault -o default -F _imagereward imagereward
"""
_ZSH = """\
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit; }  # where ~/.zshrc has not done so
autoload -Uz bashcompinit && bashcompinit
"""


def script(shell: str, commands: Mapping[str, str], recipes: Sequence[str], conversions: Sequence[str]) -> str:
    """The completion script of a shell.

    Args:
        commands: {name: what it does}.
        recipes: what follows --config; files are completed too.
        conversions: what follows `convert`.

    Raises:
        ValueError: no such shell.
    """
    if shell not in SHELLS:
        raise ValueError(f"--completion {shell!r}{did_you_mean(shell, SHELLS)}: expected one of {', '.join(SHELLS)}")
    flags = {name: flags_of(name) for name in commands}
    if shell == "fish":
        return _fish(commands, flags, recipes, conversions)
    text = _BASH.format(
        commands=" ".join([*commands, *GLOBAL_FLAGS]),
        recipes=" ".join(recipes),
        shells=" ".join(SHELLS),
        conversions=" ".join(conversions),
        cases="\n".join(f'            {name}) words="{" ".join(words)}" ;;' for name, words in flags.items() if words),
    )
    return _ZSH + text if shell == "zsh" else text


def flags_of(name: str) -> list[str]:
    """The flags of a command, sorted, as its help names them; none if a package that it needs is not installed."""
    flag = r"--[a-z][a-z-]*\b(?![.-])"
    if name == "train":  # whose help is prose; others begin a line with each flag
        return sorted(set(re.findall(rf"(?<![\w-]){flag}", help_of(name))))
    found = re.findall(rf"^  (?:-\w(?: \S+)?, )?({flag})", help_of(name), re.MULTILINE)
    return sorted({*found, *(["--config"] if name == "plan" else [])})


def help_of(name: str) -> str:
    """The help of a command; "" if it has none of its own, or a package that it needs is not installed."""
    try:
        main = importlib.import_module(f"imagereward_jax.{name}").main
    except (ModuleNotFoundError, AttributeError):  # `convert` and `recipes` are words of `imagereward` alone
        return ""
    text, argv = io.StringIO(), sys.argv
    sys.argv = [f"imagereward {name}"]  # whose name help shows
    try:
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(io.StringIO()):
            main([name, "--help"] if name == "train" else ["--help"])  # absl's flags come after the program's name
    except SystemExit:
        pass
    finally:
        sys.argv = argv
    return text.getvalue()


def _fish(commands, flags, recipes, conversions):
    first, after = "-n __fish_use_subcommand", "-n '__fish_seen_subcommand_from {}'"
    told = {name: does.replace("'", r"\'") for name, does in commands.items()}
    lines = [f"complete -c imagereward -f {first} -a {name} -d '{does}'" for name, does in told.items()]
    lines += [f"complete -c imagereward {first} -l {flag[2:]}" for flag in GLOBAL_FLAGS[:2]]
    lines.append(f"complete -c imagereward {first} -x -l completion -a '{' '.join(SHELLS)}'")
    for name, words in flags.items():
        for flag in words:
            value = f" -r -a '{' '.join(recipes)}'" if flag == "--config" else ""
            lines.append(f"complete -c imagereward {after.format(name)} -l {flag[2:]}{value}")
    lines.append(f"complete -c imagereward {after.format('convert')} -a '{' '.join(conversions)}'")
    return "\n".join(lines) + "\n"
