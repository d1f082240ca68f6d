"""Claims about the files themselves: what imports what, and that the README is true."""

import ast
import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def python_files():
    return [path for path in [*ROOT.glob("*.py"), *ROOT.glob("extras/**/*.py")]]


def test_heterolora_imports_torch_and_the_standard_library_only():
    tree = ast.parse((ROOT / "heterolora.py").read_text())
    roots = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            roots.add(node.module.split(".")[0])
    assert roots - {"torch"} <= sys.stdlib_module_names


def test_A_and_B_are_known_to_the_adapters_themselves_and_their_tests_alone():
    for path in [ROOT / "model.py", ROOT / "data.py", ROOT / "train.py", *ROOT.glob("extras/*.py")]:
        if path.name != "adapters.py":
            assert not re.search(r"\w\.[AB]\b", path.read_text()), path


def readme_blocks(language):
    text = (ROOT / "README.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_python_examples_of_the_readme_run(tmp_path):
    source = "\n".join(readme_blocks("python"))
    assert ".proxy(" in source and ".allocator(" in source and "inject(" in source
    source += '\nprint(adapters["0"](torch.ones(3, 8, dtype=torch.bfloat16)).dtype)'
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", source],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("torch.bfloat16\n")


def test_the_readme_names_only_flags_that_exist():
    known = set()
    for path in python_files():
        known |= set(re.findall(r'"(--[a-z-]+)"', path.read_text()))
    for block in readme_blocks("sh"):
        for flag in re.findall(r"(?<!\S)--[a-z-]+", block):
            assert flag in known | {"--no-deps"}, flag


def test_the_reference_lists_all_proxies_and_allocators():
    text = (ROOT / "docs" / "REFERENCE.md").read_text()
    code = [path.read_text() for path in [ROOT / "heterolora.py", *ROOT.glob("extras/*.py")]]
    for title, decorator in (("Proxies", "proxy"), ("Allocators", "allocator")):
        section = text.split(f"### {title}\n")[1].split("\n#")[0]
        first_cells = re.findall(r"^\| (`.*?`) \|", section, re.M)
        listed = [name for cell in first_cells for name in re.findall(r"`(.*?)`", cell)]
        registered = re.findall(rf'^@.*\b{decorator}\("(.*?)"', "\n".join(code), re.M)
        assert sorted(listed) == sorted(registered) and len(listed) > 5
