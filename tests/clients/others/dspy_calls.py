"""A DSPy program on a server: its chat and its JSON adapter, and what it samples n times."""

from __future__ import annotations

import os
import tempfile

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
os.environ["DSPY_CACHEDIR"] = tempfile.mkdtemp()

import dspy
from calls import run


class Judge(dspy.Signature):
    """Say whether the command changes files."""

    command: str = dspy.InputField()
    changes: bool = dspy.OutputField()


def model_of(url: str, model: str, **kwargs) -> dspy.LM:
    return dspy.LM(
        f"openai/{model}", api_base=f"{url}/v1", api_key="none", cache=False, num_retries=0, **kwargs
    )


def check_a_language_model_is_called(url: str, model: str) -> None:
    lm = model_of(url, model, max_tokens=16, temperature=0.0)
    first, again = lm("How do I list files?"), lm("How do I list files?")
    assert first and first == again
    several = lm(messages=[{"role": "user", "content": "Hello"}], n=3, temperature=0.9)
    assert len(several) == 3


def check_a_signature_through_the_json_adapter(url: str, model: str) -> None:
    """The schema is enforced while tokens are chosen: even a tiny model's answer can be parsed."""
    # DSPy asks for a schema by itself only of models that are on its list.
    properties = {"changes": {"type": "boolean"}}
    schema = {"type": "object", "properties": properties, "required": ["changes"]}
    schema["additionalProperties"] = False
    wanted = {"type": "json_schema", "json_schema": {"name": "judge", "strict": True, "schema": schema}}
    lm = model_of(url, model, max_tokens=100, temperature=0.0, response_format=wanted)
    with dspy.context(lm=lm, adapter=dspy.JSONAdapter()):
        found = dspy.Predict(Judge)(command="rm -r build")
    assert isinstance(found.changes, bool)


if __name__ == "__main__":
    run(globals())
