"""How the seven scripts read, in numbers, as a Markdown table.

python tests/measure.py                  # of this tree
python tests/measure.py --path           # the functions that one training step runs through, with their lines
git worktree add ../before COMMIT && python tests/measure.py ../before
"""

import argparse
import ast
import re
import statistics
import sys
import tempfile
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = "sdit data train sample export curate evaluate".split()


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def measure(root):
    """{what: number} over the seven scripts of a tree."""
    files = [root / f"{name}.py" for name in SCRIPTS]
    lines = [line for path in files for line in path.read_text().splitlines()]
    code = [line for line in lines if line.strip() and not line.strip().startswith("#")]
    parts = [node for path in files for node in functions(ast.parse(path.read_text()))]
    inside = [
        line
        for path in files
        for node in functions(ast.parse(path.read_text()))
        for line in path.read_text().splitlines()[node.lineno : node.end_lineno]
    ]
    tokens = 0
    for path in files:
        with open(path, "rb") as f:
            kinds = (
                tokenize.COMMENT,
                tokenize.NL,
                tokenize.NEWLINE,
                tokenize.INDENT,
                tokenize.DEDENT,
                tokenize.ENCODING,
            )
            tokens += sum(token.type not in kinds for token in tokenize.tokenize(f.readline))
    guards = [line for line in code if re.match(r"\s*(raise|except|try:|assert)\b", line)]
    comments = [
        line for line in lines if line.strip().startswith("#") and not line.startswith("# ---")
    ]
    text = re.sub(r"```.*?```", "", (root / "README.md").read_text(), flags=re.DOTALL)
    return {
        "bytes": sum(path.stat().st_size for path in files),
        "lines": len(lines),
        "characters a line, mean": round(statistics.mean(map(len, filter(None, lines)))),
        "longest line": max(map(len, lines)),
        "lines over 100 columns": sum(len(line) > 100 for line in lines),
        "tokens a line of code": round(tokens / len(code), 1),
        "comment lines per 100 lines of code": round(100 * len(comments) / len(code), 1),
        "blank lines inside functions, %": round(
            100 * sum(not line.strip() for line in inside) / len(inside), 1
        ),
        "raise, try, except lines, %": round(100 * len(guards) / len(code), 1),
        "longest function, lines": max(node.end_lineno - node.lineno + 1 for node in parts),
        "functions over 60 lines": sum(node.end_lineno - node.lineno >= 60 for node in parts),
        "README, words without code": len(
            [word for word in text.split() if re.search(r"\w", word)]
        ),
    }


def training_step():
    """[(file, function, lines, those without docstrings and blank lines)] that run from the command line of train.py to the optimizer's first step."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import torch

    import data
    import train
    from test_train import record

    seen, files = {}, {str(ROOT / f"{name}.py") for name in SCRIPTS}

    def trace(frame, event, _):
        code = frame.f_code
        if (
            code.co_filename in files
            and not code.co_name.startswith("<")
            and "<locals>" not in code.co_qualname
        ):
            seen.setdefault((Path(code.co_filename).name, code.co_qualname), code.co_firstlineno)

    class Done(Exception):
        pass

    def step(*_, **__):
        sys.setprofile(None)
        raise Done

    with tempfile.TemporaryDirectory() as folder:
        about = dict(
            latent_channels=4,
            latent_size=8,
            scene_width=16,
            autoencoder="a",
            autoencoder_sha256="0",
            clip="c",
            clip_sha256="1",
        )
        writer = data.CacheWriter(Path(folder, "cache"), about)
        for i in range(12):
            writer.add(record(8, i, 4, 8, 16), dict(file=str(i)))
        writer.finish([dict(file=str(i), frames=8) for i in range(12)])
        sys.argv = f"train.py --size demo --frames 4 --data {folder}/cache --out {folder}/run --batch 2 --steps 1 --preview 0".split()
        torch.optim.AdamW.step = step
        sys.setprofile(trace)
        try:
            train.main()
        except Done:
            pass

    lengths = {}
    for name in SCRIPTS:
        lines = (ROOT / f"{name}.py").read_text().splitlines()
        for node in functions(ast.parse("\n".join(lines))):
            text = range(node.lineno, node.end_lineno + 1)
            words = range(0)
            if ast.get_docstring(node):
                words = range(node.body[0].lineno, node.body[0].end_lineno + 1)
            code = [i for i in text if i not in words and lines[i - 1].strip()]
            lengths[f"{name}.py", node.name, node.lineno] = len(text), len(code)
    found = []
    for (file, function), first in seen.items():
        name = function.split(".")[-1]
        near = [
            n
            for (f, g, line), n in lengths.items()
            if (f, g) == (file, name) and 0 <= line - first <= 3
        ]
        found += [(file, function, *near[0])] if near else []
    return found


def main():
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument("trees", type=Path, nargs="*", default=[ROOT])
    ap.add_argument("--path", action="store_true")
    a = ap.parse_args()
    if a.path:
        path = training_step()
        for file, function, lines, code in path:
            print(f"{lines:4d} {code:4d}  {file}: {function}")
        lines, code = (sum(numbers) for numbers in list(zip(*path))[2:])
        return print(
            f"{lines} lines, {code} without docstrings and blank lines, in {len(path)} functions"
        )

    found = [measure(tree.resolve()) for tree in a.trees]
    print(
        "|"
        + "".join(f" | {tree.resolve().name}" for tree in a.trees)
        + " |\n|---"
        + "|---" * len(found)
        + "|"
    )
    for what in found[0]:
        print(f"| {what}" + "".join(f" | {numbers[what]:,}" for numbers in found) + " |")


if __name__ == "__main__":
    main()
