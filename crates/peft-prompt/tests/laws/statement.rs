//! What the methods state of themselves, for the laws: here and in the comparison over all backends.

use peft_core::{Method, Site};
use peft_prompt::{
    LlamaAdapterConfig, MultitaskPromptTuningConfig, PTuningConfig, PrefixTuningConfig, PromptAdapter,
    PromptBankConfig, PromptTuningConfig,
};
use peft_testkit::Laws;

/// Width of the laws' model.
const WIDTH: usize = 16;

fn laws<M: Method>(method: M, params: fn(&M, &Site) -> usize, bad: &'static str) -> Laws<M> {
    Laws::new(method, params, (bad, 0.into()))
        .skip("identity", "whatever stands in front is read")
        .skip("attach_nothing", "a prompt is in front of the model, and not in layers by name")
        .skip("unaware", "a place is there for adapters alone")
        .skip("encoder", "a place is there for adapters alone")
}

fn prompt_laws<M: Method<Adapter = PromptAdapter>>(method: M, params: fn(&M, &Site) -> usize) -> Laws<M> {
    laws(method, params, "num_virtual_tokens")
}

/// The laws for prompt tuning.
pub(crate) fn prompt() -> Laws<PromptTuningConfig> {
    prompt_laws(PromptTuningConfig::new(3), |method, _| method.num_virtual_tokens * WIDTH)
}

/// The laws for prefix tuning, whose keys are as wide as the model's.
pub(crate) fn prefix() -> Laws<PrefixTuningConfig> {
    prompt_laws(PrefixTuningConfig::new(3), |method, _| method.num_virtual_tokens * 2 * WIDTH)
}

/// The laws for P-tuning with an LSTM.
pub(crate) fn p_tuning() -> Laws<PTuningConfig> {
    prompt_laws(PTuningConfig::new(3, 4).with_lstm(1), |method, _| method.num_virtual_tokens * WIDTH)
        .skip("file", "what is trained is in a file of its own, which no list of keys names")
}

/// The laws for multitask prompts of the two rows of the laws' batch.
pub(crate) fn multitask() -> Laws<MultitaskPromptTuningConfig> {
    prompt_laws(MultitaskPromptTuningConfig::new(3, 2), |method, _| {
        let n = method.num_virtual_tokens;
        n * WIDTH + method.num_tasks * method.num_ranks * (n + WIDTH)
    })
}

/// The laws for LLaMA-Adapter.
pub(crate) fn llama_adapter() -> Laws<LlamaAdapterConfig> {
    Laws::new(LlamaAdapterConfig::new(3, 1), |method, _| method.adapter_len * WIDTH + 1, ("adapter_len", 0.into()))
        .skip("attach_nothing", "it names attention, of which the model has one")
        .skip("unaware", "a place is there for adapters alone")
        .skip("encoder", "a place is there for adapters alone")
}

/// The laws for forms that differ from these in what is computed before it is used.
#[allow(dead_code, reason = "the comparison over all backends leaves these to the forms above")]
pub(crate) fn variants() -> (Laws<PrefixTuningConfig>, Laws<PTuningConfig>, Laws<PromptBankConfig>) {
    let projected = prompt_laws(PrefixTuningConfig::new(3).with_projection(4), |_, _| 0)
        .skip("file", "what is trained is in a file of its own, which no list of keys names");
    let mlp = prompt_laws(PTuningConfig::new(3, 4), |_, _| 0)
        .skip("file", "what is trained is in a file of its own, which no list of keys names");
    let bank = PromptBankConfig::prefixes(3, 2);
    (projected, mlp, prompt_laws(bank, |method, _| method.num_tasks * method.num_virtual_tokens * 2 * WIDTH))
}
