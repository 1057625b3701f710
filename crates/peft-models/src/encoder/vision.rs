//! Images for ViT and DINOv2: each patch by a convolution, a learned token before them, and learned positions.
//!
//! Positions for an image of another size than the table was made for are read off the table by bicubic interpolation, as in
//! `torch.nn.functional.interpolate` without antialiasing.

use burn::module::{Initializer, Module, Param};
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::tensor::{Device, Tensor, TensorData};
use peft_core::{Named, conv2d};

use crate::config::EncoderConfig;

#[derive(Module, Debug)]
pub(crate) struct PatchEmbeddings {
    /// `[1, 1, hidden]`
    cls_token: Param<Tensor<3>>,
    /// `[1, 1 + patches, hidden]`
    position_embeddings: Param<Tensor<3>>,
    projection: Named<Conv2d>,
}

impl PatchEmbeddings {
    pub(crate) fn new(config: &EncoderConfig, side: usize, patch: usize, channels: usize, device: &Device) -> Self {
        let initializer = Initializer::Normal { mean: 0.0, std: 0.02 };
        let projection = Conv2dConfig::new([channels, config.hidden_size], [patch, patch])
            .with_stride([patch, patch])
            .with_initializer(initializer.clone());
        Self {
            cls_token: initializer.init([1, 1, config.hidden_size], device),
            position_embeddings: initializer.init([1, 1 + (side / patch).pow(2), config.hidden_size], device),
            projection: Named::new("patch_embeddings.projection", projection.init(device)),
        }
    }

    /// `[batch, channels, height, width]` to `[batch, 1 + patches, hidden]`
    pub(crate) fn forward(&self, pixels: Tensor<4>) -> Tensor<3> {
        let patches = conv2d(&self.projection, pixels); // [batch, hidden, rows, columns]
        let [batch, hidden, rows, columns] = patches.dims();
        let patches = patches.flatten::<3>(2, 3).swap_dims(1, 2); // [batch, rows · columns, hidden]
        let first = self.cls_token.val().expand([batch, 1, hidden]);
        Tensor::cat(vec![first, patches], 1) + self.positions(rows, columns)
    }

    /// `[1, 1 + rows · columns, hidden]`
    fn positions(&self, rows: usize, columns: usize) -> Tensor<3> {
        let table = self.position_embeddings.val();
        let side = (table.dims()[1] - 1).isqrt();
        if (rows, columns) == (side, side) {
            return table;
        }
        let (down, across) = (resampling(side, rows), resampling(side, columns));
        let values = down.iter().flat_map(|row| {
            let of_row = |column: &Vec<f64>| -> Vec<f32> {
                row.iter().flat_map(|y| column.iter().map(move |x| (y * x) as f32)).collect()
            };
            across.iter().flat_map(of_row).collect::<Vec<f32>>()
        });
        let data = TensorData::new(values.collect::<Vec<f32>>(), [1, rows * columns, side * side]);
        let weights = Tensor::<3>::from_data(data, (&table.device().without_autodiff(), table.dtype()));
        let first = table.clone().narrow(1, 0, 1);
        Tensor::cat(vec![first, weights.matmul(table.narrow(1, 1, side * side))], 1)
    }
}

/// What each of `count` new places takes of `side` old ones. Keys 1981 with `a = −3/4`; beyond the border, the border repeats.
fn resampling(side: usize, count: usize) -> Vec<Vec<f64>> {
    const A: f64 = -0.75;
    let kernel = |distance: f64| match distance {
        d if d <= 1.0 => ((A + 2.0) * d - (A + 3.0)) * d * d + 1.0,
        d if d < 2.0 => ((A * d - 5.0 * A) * d + 8.0 * A) * d - 4.0 * A,
        _ => 0.0,
    };
    let scale = side as f64 / count as f64;
    let weights = |place: usize| {
        let centre = (place as f64 + 0.5) * scale - 0.5;
        let mut weights = vec![0.0; side];
        for offset in -1..=2 {
            let source = centre.floor() + f64::from(offset);
            let clamped = source.clamp(0.0, (side - 1) as f64);
            weights[clamped as usize] += kernel((centre - source).abs());
        }
        weights
    };
    (0..count).map(weights).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows that `torch.nn.functional.interpolate(…, mode="bicubic")` 2.15 gives for unit vectors.
    #[test]
    fn resampling_equals_pytorch() {
        let wider = [
            [1.086_806, -0.086_806, 0.0, 0.0],
            [0.5, 0.593_75, -0.093_75, 0.0],
            [-0.086_806, 0.943_287, 0.160_88, -0.017_361],
            [-0.017_361, 0.160_88, 0.943_287, -0.086_806],
            [0.0, -0.093_75, 0.593_75, 0.5],
            [0.0, 0.0, -0.086_806, 1.086_806],
        ];
        let narrower = [
            [0.685_185, 0.370_37, -0.055_556, 0.0, 0.0],
            [0.0, 0.0, 1.0, 0.0, 0.0],
            [0.0, 0.0, -0.055_556, 0.370_37, 0.685_185],
        ];
        let near = |found: Vec<Vec<f64>>, expected: Vec<&[f64]>| {
            assert_eq!(found.len(), expected.len());
            for (found, expected) in found.iter().flatten().zip(expected.into_iter().flatten()) {
                assert!((found - expected).abs() < 1e-6, "{found} {expected}");
            }
        };
        near(resampling(4, 6), wider.iter().map(|row| &row[..]).collect());
        near(resampling(5, 3), narrower.iter().map(|row| &row[..]).collect());
    }
}
