"""`python -m tests.examples.notebook FILE`: the cells of a notebook in order, as IPython runs them, without IPython.

The cells are one module, `__main__`, and their source is where `inspect` looks for it. The value of a last line is
shown as a notebook shows it.
"""

import ast
import json
import linecache
import sys
from pathlib import Path
from types import ModuleType


def main(path: Path) -> None:
    module = ModuleType("__main__")
    sys.modules["__main__"] = module
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    for number, cell in enumerate(cells):
        name, source = f"<cell {number}>", "".join(cell["source"])
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        tree = ast.parse(source)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, name, "exec"), vars(module))  # noqa: S102  (a notebook of this repository)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), name, "eval"), vars(module))  # noqa: S307  (as above)
            sys.stdout.write(value._repr_html_() + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
