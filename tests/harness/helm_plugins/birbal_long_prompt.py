"""A HELM scenario whose prompts are longer than the model allows: HELM must cut them by /tokenize and /decode."""

from helm.benchmark.adaptation.common_adapter_specs import get_generation_adapter_spec
from helm.benchmark.metrics.common_metric_specs import get_exact_match_metric_specs
from helm.benchmark.run_spec import RunSpec, run_spec_function
from helm.benchmark.scenarios.scenario import (
    CORRECT_TAG,
    TEST_SPLIT,
    Input,
    Instance,
    Output,
    Reference,
    Scenario,
    ScenarioSpec,
)


class LongPromptScenario(Scenario):
    """Three inputs of 1,000, 3,000 and 6,000 words, of which 2,048 tokens fit."""

    name = "birbal_long_prompt"
    description = "Prompts over the length."
    tags = ()

    def get_instances(self, output_path):
        return [
            Instance(
                Input(text=" ".join(f"word{n % 97}" for n in range(length))),
                [Reference(Output(text="yes"), tags=[CORRECT_TAG])],
                split=TEST_SPLIT,
            )
            for length in (1000, 3000, 6000)
        ]


@run_spec_function("birbal_long_prompt")
def get_long_prompt_spec():
    return RunSpec(
        name="birbal_long_prompt",
        scenario_spec=ScenarioSpec(class_name="birbal_long_prompt.LongPromptScenario"),
        adapter_spec=get_generation_adapter_spec(max_train_instances=0, max_tokens=10),
        metric_specs=get_exact_match_metric_specs(),
        groups=["birbal_long_prompt"],
    )
