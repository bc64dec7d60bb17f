"""The checklist "Add a backend"."""


def test_in_this_repository(tree, guide):
    tree.follow("backend")
    assert guide.stated("backend") == (None, len(tree.touched))
    tree.lint()
    doctor, checked, options, _ = guide.succeed(
        tree.run(
            ["doctor"],
            ["check", "random_topk", "--attention.backend=by_sequence"],
            ["describe", "random_topk", "--attention.backend=by_sequence"],
            ["pytest", "tests/kernels/backends/test_by_sequence.py"],
        )
    )
    assert "yes by_sequence      the oracle, one sequence after the other" in doctor
    assert " 0 failed" in checked
    assert "here 'by_sequence'" in options
