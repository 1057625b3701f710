//! What prompt methods do beyond PEFT's files: rows of several tasks, places in a text, a choice of blocks, prompts that depend on the text; and what they leave alone.

use burn::module::{Module, Param};
use burn::tensor::activation::softmax;
use burn::tensor::{Device, Int, Tensor, TensorData};
use peft_core::{
    AdapterFile, Error, Method, ParamVisitor, PathStack, Peft as _, Strictness, attach, for_tasks, load_adapter,
    save_adapter, visit_params,
};
use peft_models::encoder::{Input, Text};
use peft_models::load::{Packing, Precision};
use peft_models::{CausalLm, KvCache, Layout, ModelSource, Pretrained, Sampling, generate};
use peft_prompt::{
    Banked, MultitaskPromptTuningConfig, PTuningConfig, PrefixTuningConfig, PromptBankConfig, PromptTuningConfig,
    SourceTasks, ensemble, start_at,
};
use peft_quant::{Format, Quantization};

use crate::encoders::{encoder, text};
use crate::golden::{deviation, model, testdata};

/// How far results of the same computation in another order may be apart.
const NEAR: f32 = 1e-5;

fn ids(rows: &[&[i64]]) -> Tensor<2, Int> {
    let dims = [rows.len(), rows[0].len()];
    Tensor::from_data(TensorData::new(rows.concat(), dims), &Device::flex())
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter().collect()
}

#[track_caller]
fn near<const D: usize>(found: Tensor<D>, expected: Tensor<D>) {
    let found = deviation(&values(found), &values(expected));
    assert!(found < NEAR, "{found}");
}

fn file<M: Method>(module: &impl Module, method: &M) -> AdapterFile<M> {
    AdapterFile::collect(module, method).unwrap()
}

fn filled<T: Module, M: Method>(module: T, file: AdapterFile<M>) -> T {
    let module = attach(module, &file.method, 0).unwrap();
    file.fill(module, testdata().as_path(), Strictness::default()).unwrap()
}

/// Prompts that were learned one by one, together: a row of each task gives what it gives alone, and the same row under each prompt is an ensemble.
fn bank_of<M: Banked>(method: &M, seeds: [u64; 3]) {
    let singles = seeds.map(|seed| attach(model("llama"), method, seed).unwrap());
    let files = singles.each_ref().map(|single| file(single, method));
    let bank = PromptBankConfig::of(&files).unwrap();
    let dir = tempfile::tempdir().unwrap();
    bank.write(dir.path()).unwrap();
    let (together, _) = load_adapter::<_, PromptBankConfig>(model("llama"), dir.path()).unwrap();
    let rows: [&[i64]; 3] = [&[3, 1, 8, 4], &[5, 2, 6, 9], &[7, 7, 1, 0]];
    let found = for_tasks(&[2, 0, 1], || together.forward(ids(&rows)));
    for (row, task) in [2, 0, 1].into_iter().enumerate() {
        near(found.clone().narrow(0, row, 1), singles[task].forward(ids(&[rows[row]])));
    }
    let found = ensemble(3, ids(&rows[..2]), |ids| together.forward(ids));
    for (row, ids_of_row) in rows[..2].iter().enumerate() {
        let each = singles.each_ref().map(|single| softmax(single.forward(ids(&[ids_of_row])), 2));
        near(found.clone().narrow(0, row, 1), Tensor::cat(each.to_vec(), 0).mean_dim(0));
    }
    // One task for all rows, token by token behind a cache.
    let sampling = Sampling::default();
    let device = Device::flex();
    let of_one = |model: &CausalLm| generate(model, &[3, 1, 8], 4, sampling, &[], &device, |_| true).unwrap();
    assert_eq!(for_tasks(&[1], || of_one(&together)), of_one(&singles[1]));
}

#[test]
fn rows_of_several_tasks_have_their_own_prompts() {
    bank_of(&PromptTuningConfig::new(3), [1, 2, 3]);
    bank_of(&PrefixTuningConfig::new(3), [1, 2, 3]);
    // What an encoder computed is all that is kept of it.
    bank_of(&PTuningConfig::new(3, 4), [1, 2, 3]);
}

#[test]
fn banks_of_what_does_not_fit_are_refused() {
    let refused = |error: Error, with: &str| assert!(error.to_string().contains(with), "{error}");
    let of = |n, width| {
        let method = PromptTuningConfig::new(n);
        file(&attach(model(width), &method, 0).unwrap(), &method)
    };
    refused(PromptBankConfig::of(&[of(3, "llama"), of(4, "llama")]).unwrap_err(), "prompt_embeddings");
    refused(PromptBankConfig::of::<PromptTuningConfig>(&[]).unwrap_err(), "num_tasks");
    let mut besides = of(3, "llama");
    let more = besides.tensors["prompt_embeddings"].clone();
    besides.tensors.insert("classifier.weight".to_owned(), more);
    refused(PromptBankConfig::of(&[besides]).unwrap_err(), "classifier.weight");
    let elsewhere = AdapterFile { base_fingerprint: Some("of another".to_owned()), ..of(3, "llama") };
    refused(PromptBankConfig::of(&[of(3, "llama"), elsewhere]).unwrap_err(), "base_model_name_or_path");
    // What a row of a bank cannot have of its own.
    let bank_of = |method: PrefixTuningConfig| {
        let file = file(&attach(model("llama"), &method, 0).unwrap(), &method);
        PromptBankConfig::of(&[file]).unwrap_err()
    };
    refused(bank_of(PrefixTuningConfig::new(2).without_shift()), "unshifted");
    refused(bank_of(PrefixTuningConfig::new(2).in_layers([1])), "layers_to_transform");
    let placed = PTuningConfig { direct: true, ..PTuningConfig::new(2, 4).in_place_of(0) };
    let placed = file(&attach(model("llama"), &placed, 0).unwrap(), &placed);
    refused(PromptBankConfig::of(&[placed]).unwrap_err(), "placeholder_token_id");
}

#[test]
fn a_task_of_many_is_a_plain_prompt_and_the_start_of_another() {
    let method = MultitaskPromptTuningConfig { num_ranks: 2, ..MultitaskPromptTuningConfig::new(4, 3) };
    let many = attach(model("gpt2"), &method, 5).unwrap();
    let text = || ids(&[&[3, 1, 8, 4]]);
    let third = for_tasks(&[2], || many.forward(text()));
    let learned = file(&many, &method);
    let plain = filled(model("gpt2"), MultitaskPromptTuningConfig::prompt_of(&learned, 2).unwrap());
    near(plain.forward(text()), third.clone());
    let exact = filled(model("gpt2"), MultitaskPromptTuningConfig::of_source(&learned, SourceTasks::Exact(2)).unwrap());
    near(for_tasks(&[0], || exact.forward(text())), third);
    let average = MultitaskPromptTuningConfig::of_source(&learned, SourceTasks::Average).unwrap();
    let (all, mean) = (&learned.tensors["prefix_task_rows"], &average.tensors["prefix_task_rows"]);
    let size = mean.values.len();
    assert_eq!((all.values.len(), &mean.shape[..1]), (3 * size, &[1][..]));
    for at in 0..size {
        let expected = (all.values[at] + all.values[size + at] + all.values[2 * size + at]) / 3.0;
        assert!((mean.values[at] - expected).abs() < 1e-7);
    }
    for error in [
        MultitaskPromptTuningConfig::prompt_of(&learned, 3).map(|_| ()).unwrap_err(),
        MultitaskPromptTuningConfig::of_source(&learned, SourceTasks::Exact(3)).map(|_| ()).unwrap_err(),
    ] {
        assert!(error.to_string().contains("below 3"), "{error}");
    }
    // Tensors that are not those of the configuration.
    let broken = |change: fn(&mut Vec<usize>)| {
        let mut file = learned.clone();
        change(&mut file.tensors.get_mut("prefix_task_rows").unwrap().shape);
        file
    };
    for file in [broken(Vec::clear), broken(|shape| shape[2] = 7)] {
        let error = MultitaskPromptTuningConfig::prompt_of(&file, 2).map(|_| ()).unwrap_err();
        assert!(error.to_string().contains("expected"), "{error}");
    }
    assert!(MultitaskPromptTuningConfig::of_source(&broken(Vec::clear), SourceTasks::Average).is_err());
}

/// Virtual tokens in the places of a token: those with the embeddings of words say what the words say there.
#[test]
fn virtual_tokens_take_the_places_of_a_token() {
    let base = model("llama");
    let words = values(base.embed(ids(&[&[5, 9, 2]])));
    let method = PTuningConfig { direct: true, ..PTuningConfig::new(3, 4).in_place_of(0) };
    let placed = start_at(model("llama"), &method, &words, 0).unwrap();
    let rows: [&[i64]; 2] = [&[0, 3, 0, 1, 0, 8], &[4, 0, 0, 0, 6, 7]];
    let expected = base.forward(ids(&[&[5, 3, 9, 1, 2, 8], &[4, 5, 9, 2, 6, 7]]));
    near(placed.forward(ids(&rows)), expected.clone());
    assert_eq!(placed.max_tokens(), base.max_tokens());
    // The same token by token, behind a cache.
    let mut cache = KvCache::default();
    let step =
        |from, count, cache: &mut KvCache| placed.hidden(ids(&rows).narrow(1, from, count), Layout::Rows, Some(cache));
    let begun = step(0, 5, &mut cache);
    let last = step(5, 1, &mut cache);
    let whole = placed.hidden(ids(&rows), Layout::Rows, None);
    near(Tensor::cat(vec![begun, last], 1), whole);
    // In an encoder, where the position of a placeholder is that of its virtual token.
    let base = encoder("bert_seqcls");
    let words = values(base.embed(ids(&[&[5, 9, 2]])));
    let placed = start_at(encoder("bert_seqcls"), &method, &words, 0).unwrap();
    let read = |of: &peft_models::Encoder, rows: [&[i64]; 2]| of.forward(&Input::Text(Text::new(ids(&rows))));
    near(read(&placed, rows), read(&base, [&[5, 3, 9, 1, 2, 8], &[4, 5, 9, 2, 6, 7]]));
}

/// With a summary of the text, texts have prompts of their own, padding changes nothing, and the encoder is needed.
#[test]
fn a_prompt_can_depend_on_the_text() {
    let method = PTuningConfig { input_conditioned: true, ..PTuningConfig::new(3, 4).with_lstm(1) };
    let conditioned = attach(encoder("bert_seqcls"), &method, 1).unwrap();
    let plain = attach(encoder("bert_seqcls"), &PTuningConfig::new(3, 4).with_lstm(1), 1).unwrap();
    let read = |of: &peft_models::Encoder, text: Text| of.forward(&Input::Text(text));
    let two = || text("bert_seqcls", true);
    let both = read(&conditioned, two());
    assert!(deviation(&values(both.clone()), &values(read(&plain, two()))) > 1e-3);
    // A row alone, without the padding that the batch gives it.
    let mask = two().mask.unwrap();
    let real = mask.clone().narrow(0, 1, 1).sum().into_scalar::<i64>() as usize;
    assert!(real < mask.dims()[1]);
    let cut = |x: Tensor<2, Int>| x.narrow(0, 1, 1).narrow(1, 0, real);
    let alone = Text { ids: cut(two().ids), mask: None, types: two().types.map(cut) };
    near(read(&conditioned, alone), both.clone().narrow(0, 1, 1));
    let dir = tempfile::tempdir().unwrap();
    save_adapter(&conditioned, &method, None, dir.path()).unwrap();
    let again = load_adapter::<_, PTuningConfig>(encoder("bert_seqcls"), dir.path()).unwrap().0;
    assert_eq!(values(read(&again, two())), values(both));
    std::fs::remove_file(dir.path().join(peft_core::files::ENCODER_FILE)).unwrap();
    let error = load_adapter::<_, PTuningConfig>(encoder("bert_seqcls"), dir.path()).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("prompt_encoder."), "{error}");
    // A decoder would have to know what it is about to say.
    let error = attach(model("llama"), &method, 1).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("input_conditioned"), "{error}");
    let error = PTuningConfig { input_conditioned: true, ..PTuningConfig::new(3, 4) }.check().unwrap_err();
    assert!(error.to_string().contains("LSTM"), "{error}");
}

/// A prefix in some blocks is what a prefix in all is whose other blocks do not see theirs; and generation goes on behind it.
#[test]
fn a_prefix_can_be_in_some_blocks() {
    for name in ["llama", "gpt2"] {
        let method = PrefixTuningConfig::new(3).in_layers([1]);
        let some = attach(model(name), &method, 2).unwrap();
        let blocks = some.config().num_layers();
        let all = attach(model(name), &PrefixTuningConfig::new(3), 2).unwrap();
        assert_eq!(all.train().trainable().trainable, blocks * some.clone().train().trainable().trainable);
        // The first block does not see the prefix, so what goes into the second is the base's, but for positions that are all three later.
        let whole = some.forward(ids(&[&[3, 1, 8, 4]]));
        assert!(deviation(&values(whole.clone()), &values(model(name).forward(ids(&[&[3, 1, 8, 4]])))) > 1e-3);
        let mut cache = KvCache::default();
        let mut logits = Vec::new();
        for token in [3, 1, 8, 4] {
            let hidden = some.hidden(ids(&[&[token]]), Layout::Rows, Some(&mut cache));
            logits.push(some.head(hidden.flatten(0, 1)));
        }
        near(Tensor::cat(logits, 0), whole.squeeze_dim(0));
        for layers in [vec![], vec![blocks], vec![1, 0], vec![0, 0]] {
            let error = attach(model(name), &PrefixTuningConfig::new(3).in_layers(layers), 0).map(|_| ()).unwrap_err();
            assert!(error.to_string().contains("layers_to_transform"), "{error}");
        }
        // The text of a prefix, of which these blocks take their part.
        let past = model(name).past_of(ids(&[&[5, 9, 2]]));
        let part = method.of_text(past.clone()).unwrap();
        near(part.clone(), past.narrow(1, 2, 2));
        start_at(model(name), &method, &values(part), 0).unwrap();
    }
}

/// A fixed prefix is a text that need not be read again: nothing of it is trained.
#[test]
fn a_fixed_prefix_is_not_trained() {
    let base = model("llama");
    let method = PrefixTuningConfig { fixed: true, ..PrefixTuningConfig::new(3) };
    let past = values(base.past_of(ids(&[&[5, 9, 2]])));
    let fixed = start_at(base, &method, &past, 0).unwrap();
    let whole = model("llama").forward(ids(&[&[5, 9, 2, 4, 1]])).narrow(1, 3, 2);
    near(fixed.forward(ids(&[&[4, 1]])), whole);
    assert_eq!(fixed.train().trainable().trainable, 0);
}

/// All values of the base, as they are.
#[derive(Default)]
struct Base(Vec<(String, Vec<f32>)>);

impl ParamVisitor for Base {
    fn float<const D: usize>(&mut self, at: &PathStack, param: &Param<Tensor<D>>) {
        if at.locate().field.is_none() {
            self.0.push((at.path(), values(param.base())));
        }
    }
}

fn base_of(module: &impl Module) -> Vec<(String, Vec<f32>)> {
    let mut base = Base::default();
    visit_params(module, &mut base);
    base.0
}

/// After steps of training the prompt is another, and the base the same to the bit.
fn trains_alone<M: Method>(method: &M) {
    use burn::optim::{AdamWConfig, GradientsParams};
    let device = Device::flex().autodiff();
    let source = ModelSource::Dir(testdata().join("models/llama"));
    let before = attach(Pretrained::load(&source, &device).unwrap().model, method, 3).unwrap();
    let (base, learned) = (base_of(&before), file(&before, method).tensors);
    let mut optimizer = AdamWConfig::new().init();
    let mut trained = before;
    for _ in 0..2 {
        let ids = Tensor::<2, Int>::from_data(TensorData::new(vec![3_i64, 1, 8, 4], [1, 4]), &device);
        let loss = for_tasks(&[0], || trained.forward(ids)).square().mean();
        let gradients = GradientsParams::from_grads(loss.backward(), &trained);
        trained = optimizer.step(1e-2, trained, gradients);
    }
    assert_eq!(base_of(&trained), base, "{}", M::PEFT_TYPE);
    let after = file(&trained, method).tensors;
    assert!(after.iter().all(|(key, values)| *values != learned[key]), "{}: a tensor is not trained", M::PEFT_TYPE);
}

#[test]
fn the_base_stays_as_it_is() {
    trains_alone(&PromptTuningConfig::new(3));
    trains_alone(&PrefixTuningConfig::new(3));
    trains_alone(&PrefixTuningConfig::new(3).with_projection(8));
    trains_alone(&PTuningConfig::new(3, 8).with_lstm(2));
    trains_alone(&PromptBankConfig::new(3, 1));
    trains_alone(&MultitaskPromptTuningConfig::new(3, 1));
}

/// Over a packed base a prompt stands in front as over a dense one: the same as over the dense weights that it is unpacked to.
#[test]
fn prompts_stand_over_a_packed_base() {
    let source = ModelSource::Dir(testdata().join("models/llama"));
    let packing = Packing::Quantize(Quantization::new(Format::NF4));
    let load = |packing: &Packing| Pretrained::load_with(&source, packing, Precision::F32, &Device::flex()).unwrap();
    let text = || ids(&[&[3, 1, 8, 4]]);
    let check = |prompted: CausalLm, plain: CausalLm| {
        let (prompted, plain) = (prompted.forward(text()), plain.forward(text()));
        let moved = deviation(&values(prompted), &values(plain));
        assert!(moved > 1e-3, "{moved}");
    };
    let method = PrefixTuningConfig::new(3);
    check(attach(load(&packing).model, &method, 4).unwrap(), load(&packing).model);
    // A prefix of a text is that text over this base too.
    let base = load(&packing).model;
    let past = values(base.past_of(ids(&[&[5, 9, 2]])));
    let whole = base.forward(ids(&[&[5, 9, 2, 3, 1, 8, 4]])).narrow(1, 3, 4);
    let prefixed = start_at(load(&packing).model, &method, &past, 0).unwrap();
    near(prefixed.forward(text()), whole);
    let words = values(load(&packing).model.embed(ids(&[&[5, 9, 2]])));
    let prompted = start_at(load(&packing).model, &PromptTuningConfig::new(3), &words, 0).unwrap();
    check(prompted, load(&packing).model);
}
