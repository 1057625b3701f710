//! A source of weights that takes no disk: values at random, under the names of a model.

use std::path::Path;

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use peft_core::{ParamVisitor, PathStack, hf_name, visit_params};
use peft_models::weights::{TensorInfo, Weights};

/// Matrices are uniform in ±0.05, norms are one.
pub(crate) struct RandomWeights {
    tensors: Vec<TensorInfo>,
}

impl RandomWeights {
    /// For a model whose parameters are not made yet, or are to be replaced.
    pub(crate) fn of<M: Module>(model: &M) -> Self {
        let mut weights = Self { tensors: Vec::new() };
        visit_params(model, &mut weights);
        weights.tensors.sort_by(|a, b| a.name.cmp(&b.name));
        weights
    }
}

impl ParamVisitor for RandomWeights {
    fn float<const D: usize>(&mut self, at: &PathStack, param: &Param<Tensor<D>>) {
        let hf = hf_name(&at.locate(), D);
        let mut shape = param.lazy_shape().to_vec();
        if hf.transposed {
            shape.reverse();
        }
        let bytes = 4 * shape.iter().product::<usize>() as u64;
        self.tensors.push(TensorInfo { name: hf.name, shape, dtype: "F32".to_owned(), bytes, packed_rows: false });
    }
}

impl Weights for RandomWeights {
    fn path(&self) -> &Path {
        Path::new("random")
    }

    fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    fn read(&self, info: &TensorInfo) -> peft_models::Result<Vec<f32>> {
        let count = info.shape.iter().product();
        if info.shape.len() == 1 {
            return Ok(vec![1.0; count]);
        }
        // An xorshift: as good as any for what is only timed, and as fast as memory.
        let mut state =
            info.name.bytes().fold(0x9E37_79B9_u32, |state, byte| state.rotate_left(5) ^ u32::from(byte)) | 1;
        let next = || {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            (state as f32 / u32::MAX as f32 - 0.5) * 0.1
        };
        Ok(std::iter::repeat_with(next).take(count).collect())
    }
}
