"""The checklist "Add a recipe"."""

import yaml


def test_in_this_repository(tree, guide):
    tree.follow("recipe")
    assert guide.stated("recipe") == (len(tree.touched), len(tree.touched))
    (recipe,) = tree.touched
    resolved, _ = guide.succeed(
        tree.run(
            ["fit", f"--config={recipe}", "--print_config"],
            ["fit", f"--config={recipe}", "--trainer.max_steps=1", "--data.num_eval=4", "--run_dir=run"],
        )
    )
    resolved = yaml.safe_load(resolved)
    for group, options in yaml.safe_load((tree.root / recipe).read_text()).items():
        assert options.items() <= resolved[group].items()
    assert (tree.cwd / "run" / "done.json").exists()
