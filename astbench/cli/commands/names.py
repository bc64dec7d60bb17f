"""The commands and what each is for. Imports nothing."""

LIGHTNING = {
    "fit": "train, evaluate, and leave a record",
    "validate": "evaluate on the validation split",
    "test": "evaluate on the test split",
    "predict": "answer a question about a document, continue a text, translate, name what is on a picture",
}
OWN = {
    "list": "attentions, transforms, depth policies, tasks and backbones by name",
    "describe": "options, abilities and paper of an attention, transform or depth policy",
    "check": "run the conformance suite on an attention, transform or depth policy",
    "bench": "time and memory of attention layers over the length",
    "analyze": "what an attention chose, by layer, head, distance and token, beside dense attention",
    "depth": "runs at several depths, the oracle path, and what depth costs at least",
    "serve": "a trained model behind HTTP: texts as OpenAI's clients ask for them, translations, answers",
    "loadtest": "a server under load that comes at random times: latencies, throughput, what failed",
    "deploy-test": "attentions served in turn under the same load: latencies, goodput, memory, up to past the knee",
    "run": "a sweep: many runs from one file, each once; a second start does what is left",
    "table": "result tables from records: shown, written into documents, or compared with them",
    "report": "one page of HTML from records: leaderboard, costs, runs, what was chosen",
    "push": "what a run trained, onto Hugging Face's hub, with a model card made from its record",
    "reproduce": "run the command behind a row of a table again, and say whether it comes out the same",
    "doctor": "what this machine has, which backends work here and why the others do not",
}
