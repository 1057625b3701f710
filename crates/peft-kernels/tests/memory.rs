//! What a training step over packed weights holds in memory, by counting: nothing dense of a weight but a tile.
#![allow(unsafe_code, reason = "an allocator that counts is an allocator")]
#![allow(clippy::unwrap_used, reason = "everything here is a test")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor};
use peft_core::{Peft, Targets, scan};
use peft_kernels::PackedLayout;
use peft_lora::LoraConfig;
use peft_models::config::ModelConfig;
use peft_models::{CausalLm, Layout as Rows};
use peft_quant::{Quantization, quantize};
use serde_json::json;

/// The system's allocator, with the bytes in use, and the largest piece that was asked for since it was last set to zero.
struct Counting;

static IN_USE: AtomicUsize = AtomicUsize::new(0);
static LARGEST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        IN_USE.fetch_add(layout.size(), Relaxed);
        LARGEST.fetch_max(layout.size(), Relaxed);
        // SAFETY: by the caller's word.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        IN_USE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: by the caller's word.
        unsafe { System.dealloc(place, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Decoder layers of `SmolLM2`-135M, packed, with a small vocabulary.
fn model(layers: usize, device: &Device) -> CausalLm {
    let config = json!({
        "model_type": "llama", "vocab_size": 64, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": layers,
        "num_attention_heads": 9, "num_key_value_heads": 3, "rms_norm_eps": 1e-5, "rope_theta": 100000.0,
        "max_position_embeddings": 2048, "tie_word_embeddings": true, "hidden_act": "silu",
    });
    let dense = CausalLm::new(&ModelConfig::from_json(&config, "test".as_ref()).unwrap(), device);
    quantize(dense, &Quantization::default()).unwrap()
}

#[test]
fn a_step_over_packed_weights_holds_nothing_dense_of_them() {
    let device = Device::flex().autodiff();
    // Two layers more, so that all that a model has besides layers, and what libraries keep, is on both sides.
    let in_use = |model: CausalLm| {
        let with = IN_USE.load(Relaxed);
        drop(model);
        with - IN_USE.load(Relaxed)
    };
    let values = 2 * 3_538_944;
    let resident = (in_use(model(4, &device)) - in_use(model(2, &device))) as f64 / f64::from(values);
    println!("{resident:.4} bytes a packed parameter");
    assert!(resident <= 0.53, "{resident} bytes a packed parameter");

    let model = model(2, &device);
    let packed: Vec<_> = scan(&model).sites.into_iter().filter_map(|site| site.packed).collect();
    assert_eq!((packed.len(), packed.iter().map(|layout| layout.len() as i32).sum()), (14, values));
    let ids = Tensor::<2, Int>::from_data([[1, 5, 9, 13, 2, 6, 10, 14]], &device);
    let names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
    let model = model.attach(&LoraConfig::new(4, Targets::modules(names))).unwrap();
    let step = || {
        let loss = model.hidden(ids.clone(), Rows::Rows, None).square().mean();
        (IN_USE.load(Relaxed), loss.backward())
    };
    // Once for what libraries keep: threads, and room for the pieces of matrix products, which each thread has.
    step();
    rayon::broadcast(|_| {
        let square = Tensor::<2>::ones([64, 64], &Device::flex());
        square.clone().matmul(square);
    });
    let start = IN_USE.load(Relaxed);
    LARGEST.store(0, Relaxed);
    let (after_forward, gradients) = step();
    let (largest, smallest_dense) = (LARGEST.load(Relaxed), 4 * packed.iter().map(PackedLayout::len).min().unwrap());
    println!(
        "largest piece {largest}, smallest dense weight {smallest_dense}, kept for backward {}",
        after_forward - start
    );
    assert!(largest < smallest_dense, "a piece of {largest} bytes; the smallest weight is {smallest_dense} dense");
    // Activations, but no weights.
    assert!(
        (after_forward - start) < 4 * values as usize / 20,
        "{} bytes are kept for backward",
        after_forward - start
    );
    drop(gradients);
    drop(model.no_grad());
}
