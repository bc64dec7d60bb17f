"""The checklist "Add a command"."""


def test_in_this_repository(tree, guide):
    tree.follow("command")
    assert guide.stated("command") == (None, len(tree.touched))
    tree.lint()
    commands, usage, printed, _ = guide.succeed(
        tree.run(
            ["--help"],
            ["preset", "--help"],
            ["preset", "llama-tiny"],
            ["pytest", "tests/astbench/cli/test_preset.py"],
        )
    )
    assert "preset     the Hugging Face configuration of a backbone preset" in commands
    assert usage == "usage: astbench preset NAME\n"
    assert "hidden_size                  64" in printed
