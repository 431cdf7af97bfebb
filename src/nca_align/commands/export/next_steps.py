"""What `nca-align export` ends with: the commands by which one talks to the model, with its path in them."""

import json
import shlex
from importlib.util import find_spec
from pathlib import Path

PORT = 8000  # of `transformers serve` and of `vllm serve`
_SERVER_NEEDS = ("fastapi", "openai", "uvicorn")  # of the extra `transformers[serving]`


def next_steps(output: Path, chat: bool, trust_remote_code: bool = False) -> str:
    """Commands that work as they are printed, in a shell where `output` is read as it was written.

    Args:
        output: the exported folder.
        chat: whether its tokenizer has a chat template; text is completed where not.
        trust_remote_code: as the export was told.
    """
    path = shlex.quote(str(output))
    install = "" if all(map(find_spec, _SERVER_NEEDS)) else "  pip install 'transformers[serving]'   # once\n"
    serve = f"transformers serve {path}{' --trust-remote-code' if trust_remote_code else ''}"
    talk = f"transformers chat {path}"
    if not chat:
        body = json.dumps({"model": str(output), "prompt": "What makes a good day is", "max_tokens": 64})
        kind = shlex.quote("Content-Type: application/json")
        talk = f"curl http://localhost:{PORT}/v1/completions -H {kind} -d {shlex.quote(body)}"
    return (
        f"To talk to it, start the server in one terminal and the second command in another:\n{install}  {serve}\n  "
        f"{talk}\ndocs/guide/using-the-result.md has vLLM, llama.cpp, Ollama and adapters alone."
    )
