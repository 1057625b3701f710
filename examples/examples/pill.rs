//! A decoder that was trained on text alone learns to say what it sees: features of a frozen vision transformer, a projector, and PILL.
//!
//! Without arguments it runs on the small decoder of this workspace, a vision transformer with random weights and drawn patterns. On real ones:
//!
//! ```text
//! cargo xtask fetch smollm2 vit fashion-mnist
//! cargo run --release -p peft-examples --example pill -- --model data/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --vision data/vit \
//!   --data data/fashion-mnist --steps 200
//! ```

use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::Instant;

use burn::module::Module;
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::{Device, Int, Tensor, TensorData};
use peft::core::{Modalities, Modality, for_modalities};
use peft::models::config::EncoderConfig;
use peft::models::encoder::Input;
use peft::models::load::{Packing, Precision};
use peft::models::tokenizer::Tokenizer;
use peft::models::{CausalLm, Encoder, Layout, ModelSource, Pretrained, PretrainedEncoder, Sampling, generate};
use peft::moe::{FeatureConfig, PillConfig};
use peft::prelude::*;
use peft::train::data::{Content, Label, Picture, read_labelled};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// What the classes of Fashion-MNIST are called in a caption.
const CLOTHES: [&str; 10] =
    ["a t-shirt", "trousers", "a pullover", "a dress", "a coat", "a sandal", "a shirt", "a sneaker", "a bag", "a boot"];
/// The drawn patterns.
const PATTERNS: [&str; 4] = ["rows", "columns", "squares", "a slope"];

/// An image as a model of images sees it, and what is to be said of it.
struct Captioned {
    /// `[1, n, d_features]`
    features: Tensor<3>,
    caption: Vec<u32>,
    class: usize,
}

/// Pictures to learn from and to be judged by, each with its class, which has a name.
struct Pictures {
    names: Vec<&'static str>,
    learnt: Vec<(Tensor<4>, usize)>,
    held_out: Vec<(Tensor<4>, usize)>,
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |name: &str, default: usize| option(&args, name).map_or(Ok(default), str::parse::<usize>);
    let (steps, batch_size) = (number("steps", 200)?, number("batch-size", 8)?);
    let device = Device::flex().autodiff();
    let plain = Device::flex();
    device.seed(1);

    let source = option(&args, "model").unwrap_or("tiny").parse::<ModelSource>()?;
    let Pretrained { model: base, files } = Pretrained::load_with(&source, &Packing::Dense, Precision::F32, &device)?;
    let tokenizer = files.tokenizer()?;
    let (vision, pictures) = match (option(&args, "vision"), option(&args, "data")) {
        (Some(vision), Some(data)) => real(vision, data, number("train", 1600)?, number("test", 200)?, &plain)?,
        (None, None) => drawn(&plain)?,
        _ => return Err("give both --vision and --data, or none of them".into()),
    };

    let started = Instant::now();
    let see = |(pixels, class): &(Tensor<4>, usize)| {
        let features = vision.hidden(&Input::Pixels(pixels.clone()));
        let caption = format!(" a photo of {}.", pictures.names[*class]);
        let mut caption = tokenizer.encode(&caption, false)?;
        caption.extend(tokenizer.special().eos.first());
        Ok(Captioned { features, caption, class: *class })
    };
    let learnt = pictures.learnt.iter().map(see).collect::<Result<Vec<_>>>()?;
    let held_out = pictures.held_out.iter().map(see).collect::<Result<Vec<_>>>()?;
    let [_, n, width] = learnt[0].features.dims();
    println!("{} and {} images of {n} features in {:.1?}", learnt.len(), held_out.len(), started.elapsed());

    let pill = PillConfig::decoder(8).with_features(FeatureConfig { width, hidden: None });
    let model = base.clone().attach(&pill)?;
    println!("PILL: {}", model.trainable());
    let judge = |model: &CausalLm, when: &str| {
        let (loss, accuracy) = judge(model, &held_out, &pictures.names, tokenizer, &plain)?;
        println!("{when}: held-out loss {loss:.4}, the right name in {:.1} % of the captions", 100.0 * accuracy);
        for image in held_out.iter().take(6) {
            println!("  {:11} {:?}", pictures.names[image.class], say(model, image, tokenizer, &plain)?);
        }
        Ok::<_, Box<dyn Error>>(accuracy)
    };
    let before = judge(&model.valid(), "before")?;
    let started = Instant::now();
    let model = train(model, &learnt, steps, batch_size, &device);
    println!("{steps} steps of {batch_size} images in {:.1?}", started.elapsed());
    let after = judge(&model.valid(), "after")?;
    assert!(after > before, "training does not help");

    // The file holds projector, experts and gates, and goes onto any clone of the base.
    let dir = option(&args, "out")
        .map_or_else(|| std::env::temp_dir().join(format!("pill-{}", std::process::id())), PathBuf::from);
    save_adapter(&model, &pill, Some(&files.name), &dir)?;
    let (loaded, _) = load_adapter::<_, PillConfig>(base.valid(), &dir)?;
    if option(&args, "out").is_none() {
        std::fs::remove_dir_all(&dir)?;
    }
    let image = &held_out[0];
    assert_eq!(say(&loaded, image, tokenizer, &plain)?, say(&model.valid(), image, tokenizer, &plain)?);
    Ok(())
}

/// The value behind `--name`.
fn option<'a>(args: &'a [String], name: &str) -> Option<&'a str> {
    let at = args.iter().position(|arg| arg.strip_prefix("--") == Some(name))?;
    args.get(at + 1).map(String::as_str)
}

/// AdamW on the mean loss of batches, at a rate that falls to nothing; the paper's rate and decay.
fn train(mut model: CausalLm, images: &[Captioned], steps: usize, batch_size: usize, device: &Device) -> CausalLm {
    const RATE: f64 = 2e-3;
    let mut optimizer = AdamWConfig::new().with_weight_decay(0.02).init();
    for step in 0..steps {
        let batch = (0..batch_size).map(|at| &images[(step * batch_size + at) % images.len()]);
        let loss = loss(&model, batch, device);
        if step.is_multiple_of(20) {
            println!("  step {step}: loss {:.4}", loss.clone().into_scalar::<f32>());
        }
        let grads = GradientsParams::from_grads(loss.backward(), &model);
        model = optimizer.step(RATE * (1.0 - step as f64 / steps as f64), model, grads);
    }
    model
}

/// An image, then the tokens of a text, filled up to `seq`: ids, which do not matter in the places of the image, and what each token is.
fn row(n: usize, text: &[u32], seq: usize) -> (Vec<i64>, Vec<Modality>) {
    let ids = std::iter::repeat_n(0, n).chain(text.iter().map(|id| i64::from(*id))).chain(std::iter::repeat(0));
    let tokens = std::iter::repeat_n(Modality::Image, n).chain(std::iter::repeat(Modality::Text));
    (ids.take(seq).collect(), tokens.take(seq).collect())
}

/// Mean cross-entropy of the tokens of captions, each behind its image.
fn loss<'a>(model: &CausalLm, images: impl IntoIterator<Item = &'a Captioned>, device: &Device) -> Tensor<1> {
    let images: Vec<&Captioned> = images.into_iter().collect();
    let [_, n, _] = images[0].features.dims();
    let longest = images.iter().map(|image| image.caption.len()).max().unwrap_or_default();
    // The last token of a caption is said, but not read.
    let seq = n + longest - 1;
    let (ids, tokens): (Vec<_>, Vec<_>) = images.iter().map(|image| row(n, &image.caption, seq)).unzip();
    let places = images
        .iter()
        .enumerate()
        .flat_map(|(at, image)| (0..image.caption.len()).map(move |token| (at * seq + n - 1 + token) as i64));
    let said = images.iter().flat_map(|image| image.caption.iter().map(|id| i64::from(*id)));
    let ints = |values: Vec<i64>| Tensor::<1, Int>::from_data(&values[..], device);
    let (places, said) = (ints(places.collect()), ints(said.collect()));

    let features = Tensor::cat(images.iter().map(|image| image.features.clone()).collect(), 0);
    let batch = Modalities::new(tokens).with_features(features);
    let ids = Tensor::<2, Int>::from_data(TensorData::new(ids.concat(), [images.len(), seq]), device);
    let hidden = for_modalities(batch, || model.hidden(ids, Layout::Rows, None)).flatten::<2>(0, 1);
    model.scores(hidden.select(0, places), said).losses.mean()
}

/// The mean loss of captions, and in how many of those that the model makes itself the right name is.
fn judge(
    model: &CausalLm,
    images: &[Captioned],
    names: &[&str],
    tokenizer: &Tokenizer,
    device: &Device,
) -> Result<(f32, f64)> {
    let batches = images.chunks(8).map(|batch| loss(model, batch, device).into_scalar::<f32>() * batch.len() as f32);
    let loss = batches.sum::<f32>() / images.len() as f32;
    let mut right = 0;
    for image in images {
        right += usize::from(named(&say(model, image, tokenizer, device)?, names) == Some(image.class));
    }
    Ok((loss, right as f64 / images.len() as f64))
}

/// What the model says of an image.
fn say(model: &CausalLm, image: &Captioned, tokenizer: &Tokenizer, device: &Device) -> Result<String> {
    let [_, n, _] = image.features.dims();
    let (ids, tokens) = row(n, &[], n);
    let ids: Vec<u32> = ids.into_iter().map(|id| id as u32).collect();
    let batch = Modalities::new(vec![tokens]).with_features(image.features.clone());
    let stop = &tokenizer.special().eos;
    let said = for_modalities(batch, || generate(model, &ids, 12, Sampling::default(), stop, device, |_| true))?;
    Ok(tokenizer.decode(&said, true)?)
}

/// The class whose name is in a caption; of several the longest name, as a t-shirt is no shirt.
fn named(caption: &str, names: &[&str]) -> Option<usize> {
    let bare = |at: &usize| names[*at].trim_start_matches("a ");
    (0..names.len()).filter(|at| caption.contains(bare(at))).max_by_key(|at| bare(at).len())
}

/// A vision transformer from files, and the first pictures of a task that `cargo xtask fetch fashion-mnist` made.
fn real(vision: &str, data: &str, train: usize, test: usize, device: &Device) -> Result<(Encoder, Pictures)> {
    let vision = PretrainedEncoder::load(&ModelSource::Dir(vision.into()), device)?;
    let processor = vision.image_processor()?;
    let read = |part: &str, count: usize| -> Result<Vec<(Tensor<4>, usize)>> {
        let rows = read_labelled(&Path::new(data).join(format!("small-{part}-images-idx3-ubyte")))?;
        let pixels = rows.into_iter().take(count).map(|row| match (row.content, row.label) {
            (Content::Picture(Picture::Grey { values, height, width }), Label::One(class)) => {
                let rgb = values.iter().flat_map(|grey| [*grey; 3]).collect();
                Ok((processor.pixels_of(rgb, height, width, device)?, class.parse()?))
            }
            _ => Err("expected grey pictures with one label each".into()),
        });
        pixels.collect()
    };
    let (learnt, held_out) = (read("train", train)?, read("test", test)?);
    Ok((vision.model, Pictures { names: CLOTHES.to_vec(), learnt, held_out }))
}

/// A vision transformer with random weights, and patterns that are drawn for it, shifted and noisy.
fn drawn(device: &Device) -> Result<(Encoder, Pictures)> {
    const SIDE: usize = 16;
    let json = serde_json::json!({
        "architectures": ["ViTModel"], "model_type": "vit", "hidden_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "intermediate_size": 96, "hidden_act": "gelu", "layer_norm_eps": 1e-6,
        "qkv_bias": true, "image_size": SIDE, "patch_size": 8, "num_channels": 3
    });
    let vision = EncoderConfig::from_json(&json, Path::new("config.json"))?.init(1, device);
    let mut rng = StdRng::seed_from_u64(1);
    let mut draw = |at: usize| {
        let (class, shift) = (at % PATTERNS.len(), rng.random_range(0..4));
        let dark = |x: usize, y: usize| match class {
            0 => ((y + shift) / 2).is_multiple_of(2),
            1 => ((x + shift) / 2).is_multiple_of(2),
            2 => ((x + shift) / 4 + y / 4).is_multiple_of(2),
            _ => x + y < SIDE + shift,
        };
        let grey = (0..SIDE * SIDE).map(|at| f32::from(u8::from(dark(at % SIDE, at / SIDE)))).collect::<Vec<_>>();
        let grey: Vec<f32> = grey.into_iter().map(|value| value + rng.random_range(-0.2..0.2)).collect();
        (Tensor::from_data(TensorData::new(grey.repeat(3), [1, 3, SIDE, SIDE]), device), class)
    };
    let (learnt, held_out) = ((0..160).map(&mut draw).collect(), (0..24).map(&mut draw).collect());
    Ok((vision, Pictures { names: PATTERNS.to_vec(), learnt, held_out }))
}
