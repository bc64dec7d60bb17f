"""The checklist "Add a variant"."""


def test_as_your_own_file(tree, guide):
    (tree.cwd / "relu.py").write_text(guide.example("example"))
    assert guide.stated("variant")[0] == len(list(tree.cwd.iterdir()))
    checked, listed = guide.succeed(tree.run(["check", "relu", "--plugins=./relu.py"], ["list", "--plugins=./relu.py"]))
    assert " 0 failed" in checked
    assert "[./relu.py]" in listed


def test_in_this_repository(tree, guide):
    tree.follow("variant")
    assert guide.stated("variant")[1] == len(tree.touched)
    tree.lint()
    listed, checked, _, _ = guide.succeed(
        tree.run(
            ["list"],
            ["check", "zero_sink"],
            [
                "fit",
                "--config=recipes/demo/zero_sink.yaml",
                "--trainer.max_steps=2",
                "--data.demo_train=64",
                "--data.demo_eval=8",
                "--data.max_length=128",
                "--data.stride=32",
                "--data.max_question=32",
                "--data.batch_size=4",
                "--run_dir=run",
            ],
            ["pytest", "tests/registry/variants/test_zero_sink.py"],
        )
    )
    assert "zero_sink" in listed and "Xiao et al. 2023" in listed
    assert " 0 failed" in checked
    assert (tree.cwd / "run" / "done.json").exists()
