//! The fingerprint of a base: an adapter that was made on a changed base means nothing on another one.

use std::collections::BTreeMap;
use std::fmt::Debug;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Int, Tensor};
use peft_kernels::PackedLayout;
use sha2::{Digest, Sha256};

use crate::location::REPARAMETERIZATION;
use crate::quantized::PACKED;
use crate::{Error, ParamVisitor, PathStack, Problem, Result, scan, visit_params};

/// The weights under the adapters of `module` as one number: SHA-256, in lowercase hexadecimal digits, over the path of each and its own SHA-256,
/// in the order of the paths.
///
/// A dense weight counts by its shape and its values in f32, a packed one by its layout, its numbers, its code and the scales of its blocks. The
/// adapter's values do not count, nor do the device, autodiff, and whether the module is in training.
///
/// # Errors
/// [`Error::Fingerprint`] when `module` carries no adapter, or the device does not hand out a weight.
pub fn base_fingerprint<T: Module>(module: &T) -> Result<String> {
    let found = scan(module);
    let adapted = found.sites.iter().filter(|site| found.adapted.contains(&site.path));
    let digests = adapted.map(|site| (site.weight(), Sha256::new())).collect();
    let mut weights = Weights { digests, problems: Vec::new() };
    if weights.digests.is_empty() {
        let (path, what) = ("model".to_owned(), "carries no adapter".to_owned());
        weights.problems.push(Problem::Other { path, what });
    }
    visit_params(module, &mut weights);
    module.visit(&mut Parts { stack: PathStack::default(), weight: String::new(), weights: &mut weights });
    if !weights.problems.is_empty() {
        return Err(Error::Fingerprint { problems: weights.problems });
    }
    let mut whole = Sha256::new();
    for (path, digest) in weights.digests {
        // No path holds a zero byte.
        whole.update([path.as_bytes(), &[0], &digest.finalize()].concat());
    }
    Ok(whole.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// The digest of each weight under an adapter, by its path.
struct Weights {
    digests: BTreeMap<String, Sha256>,
    problems: Vec<Problem>,
}

impl Weights {
    /// Adds one tensor, or a layout, to the digest of `weight`, if that carries an adapter.
    fn add<E: Debug>(
        &mut self,
        weight: &str,
        part: &str,
        shape: &[usize],
        bytes: impl FnOnce() -> std::result::Result<Vec<u8>, E>,
    ) {
        let Some(digest) = self.digests.get_mut(weight) else { return };
        match bytes() {
            Ok(bytes) => {
                digest.update([part.as_bytes(), &[0]].concat());
                digest.update((shape.len() as u64).to_le_bytes());
                shape.iter().for_each(|size| digest.update((*size as u64).to_le_bytes()));
                digest.update(bytes);
            }
            Err(e) => self.problems.push(Problem::Other { path: weight.to_owned(), what: format!("{e:?}") }),
        }
    }

    fn float<const D: usize>(&mut self, weight: &str, part: &str, param: &Param<Tensor<D>>) {
        self.add(weight, part, &param.lazy_shape(), || {
            param.base().try_into_data().map(|data| data.iter::<f32>().flat_map(f32::to_le_bytes).collect())
        });
    }
}

impl ParamVisitor for Weights {
    fn float<const D: usize>(&mut self, at: &PathStack, param: &Param<Tensor<D>>) {
        self.float(&at.path(), "dense", param);
    }
}

/// Adds what packed weights are made of.
struct Parts<'a> {
    stack: PathStack,
    /// Path of the packed weight whose parts are visited.
    weight: String,
    weights: &'a mut Weights,
}

impl ModuleVisitor for Parts<'_> {
    fn enter_module(&mut self, name: &str, container: &str) {
        if container == REPARAMETERIZATION && name == PACKED {
            self.weight = self.stack.path();
        }
        if let (true, Some(PackedLayout { d_out, d_in, bits, block })) =
            (self.stack.in_packing(), PackedLayout::announced(container))
        {
            let none = || Ok::<_, std::convert::Infallible>(Vec::new());
            self.weights.add(&self.weight, "layout", &[d_out, d_in, bits, block], none);
        }
        self.stack.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.stack.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        // What is no vector carries the adapter; its own value does not count.
        if self.stack.in_packing() && D == 1 {
            self.weights.float(&self.weight, &self.stack.path(), param);
        }
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        if self.stack.in_packing() {
            let numbers = param.val();
            let shape = numbers.shape();
            self.weights.add(&self.weight, &self.stack.path(), &shape, || {
                numbers.try_into_data().map(|data| data.iter::<u32>().flat_map(u32::to_le_bytes).collect())
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::path::Path;

    use burn::module::Reparameterization;
    use burn::nn::{Linear, LinearConfig};
    use burn::tensor::Device;
    use peft_kernels::{BlockScales, PackedData, PackedMatrix};
    use serde::{Deserialize, Serialize};

    use super::*;
    use crate::files::{TENSOR_FILE, read_values};
    use crate::{
        AdapterFile, FileTensor, LayerKind, Method, ParamMapper, Peft as _, Site, Targets, load_adapter, map_params,
        pack, save_adapter,
    };

    /// A method that adds a matrix to a weight.
    #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
    struct Sum {
        #[serde(flatten)]
        targets: Targets,
    }

    #[derive(Module, Debug)]
    struct Summand {
        a: Param<Tensor<2>>,
    }

    impl Reparameterization for Summand {
        const NAME: &'static str = "sum";

        fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
            let shape = base.shape();
            base + self.a.val().reshape::<D, _>(shape)
        }
    }

    impl Method for Sum {
        const PEFT_TYPE: &'static str = "SUM";
        type Adapter = Summand;

        fn targets(&self) -> &Targets {
            &self.targets
        }

        fn check(&self) -> Result<()> {
            Ok(())
        }

        fn init(&self, site: &Site, _seed: u64) -> Result<Summand> {
            Ok(Summand { a: site.zeros([site.d_in, site.d_out])? })
        }

        fn tensors(_kind: LayerKind) -> &'static [FileTensor] {
            &[FileTensor { field: "a", key: "sum", transposed: true }]
        }
    }

    #[derive(Module, Debug)]
    struct Model {
        up: Linear,
        down: Linear,
        head: Linear,
    }

    fn model(device: &Device) -> Model {
        let linear = |d_in, d_out| LinearConfig::new(d_in, d_out).with_bias(false).init(device);
        Model { up: linear(4, 8), down: linear(8, 4), head: linear(4, 2) }
    }

    fn method() -> Sum {
        Sum { targets: Targets::modules(["up", "down"]) }
    }

    /// Adds to the first value of each parameter whose path begins so.
    struct Nudge(&'static str, f32);

    impl ParamMapper for Nudge {
        fn float<const D: usize>(&mut self, at: &PathStack, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            if !at.path().starts_with(self.0) {
                return param;
            }
            param.map(|tensor| {
                let (shape, trained, device) = (tensor.shape(), tensor.is_require_grad(), tensor.device());
                let mut values: Vec<f32> = tensor.into_data().try_to_vec().unwrap();
                values[0] += self.1;
                Tensor::<1>::from_floats(values.as_slice(), &device).reshape::<D, _>(shape).set_require_grad(trained)
            })
        }
    }

    fn nudged(model: &Model, path: &'static str) -> Model {
        map_params(model.clone(), &mut Nudge(path, 0.25))
    }

    fn adapted(model: &Model) -> Model {
        model.clone().attach(&method()).unwrap()
    }

    fn fingerprint(model: &Model) -> String {
        base_fingerprint(model).unwrap()
    }

    /// `up` in four bits: the numbers are all `number`, the scales as given.
    fn packed(model: &Model, number: u8, scales: BlockScales) -> Model {
        let layout = PackedLayout { d_out: 8, d_in: 4, bits: 4, block: 16 };
        let table: Vec<f32> = (0..16).map(|q| q as f32 - 8.0).collect();
        let data = PackedData { layout, bytes: vec![number << 4 | number; 16], table: table.into(), scales };
        let matrix = PackedMatrix::new(data, &Device::flex());
        pack(model.clone(), HashMap::from([(model.up.weight.id, vec![matrix])])).unwrap()
    }

    fn nested(numbers: [u8; 2]) -> BlockScales {
        let map: Vec<f32> = (0..=255).map(|q| q as f32 / 255.0).collect();
        BlockScales::Nested { numbers: numbers.to_vec(), map: map.into(), scales: vec![0.5], offset: 0.25 }
    }

    #[test]
    fn the_base_counts_and_nothing_else() {
        let base = model(&Device::flex().autodiff());
        let model = adapted(&base);
        let expected = fingerprint(&model);
        assert_eq!(expected.len(), 64);
        assert!(expected.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte)));
        for same in [
            adapted(&base),
            model.valid(),
            model.valid().train(),
            model.clone().to_device(&Device::flex()),
            nudged(&model, "up.weight.sum"),
            adapted(&nudged(&base, "head")),
        ] {
            assert_eq!(fingerprint(&same), expected);
        }
        for other in [nudged(&base, "up"), nudged(&base, "down")] {
            assert_ne!(fingerprint(&adapted(&other)), expected);
        }
        let fewer = base.clone().attach(&Sum { targets: Targets::modules(["up"]) }).unwrap();
        assert_ne!(fingerprint(&fewer), expected);
        assert!(base_fingerprint(&base).unwrap_err().to_string().contains("model: carries no adapter"));
    }

    #[test]
    fn every_part_of_a_packed_weight_counts() {
        let base = model(&Device::flex().autodiff());
        let plain = |scale| BlockScales::Plain(vec![0.5, scale]);
        let affine = |low| BlockScales::Affine { scales: vec![0.5, 1.0], lows: vec![0.0, low] };
        let models = [
            packed(&base, 3, plain(1.0)),
            packed(&base, 4, plain(1.0)),
            packed(&base, 3, plain(2.0)),
            packed(&base, 3, affine(0.0)),
            packed(&base, 3, affine(1.0)),
            packed(&base, 3, nested([1, 2])),
            packed(&base, 3, nested([1, 3])),
        ]
        .map(|model| adapted(&model));
        let mut found: Vec<String> = models.iter().map(fingerprint).collect();
        for (model, expected) in models.iter().zip(&found) {
            let same = [model.valid(), model.valid().train(), nudged(model, "up.weight.sum")];
            assert!(same.iter().all(|same| fingerprint(same) == *expected));
        }
        assert_ne!(fingerprint(&nudged(&models[0], "down.weight")), found[0]);
        // Dense, with the values that the first one stands for.
        let dense = Tensor::<1>::from_floats([-2.5; 16], &Device::flex()).repeat_dim(0, 2);
        let weight = Param::from_tensor(dense.reshape([4, 8]).autodiff());
        let unpacked = Model { up: Linear { weight, ..base.up.clone() }, ..base.clone() };
        found.push(fingerprint(&adapted(&unpacked)));
        found.sort();
        found.dedup();
        assert_eq!(found.len(), 8);
    }

    #[test]
    fn an_adapter_of_a_changed_base_is_refused_on_another() {
        let base = packed(&model(&Device::flex().autodiff()), 3, nested([1, 2]));
        let model = nudged(&adapted(&base), "up.weight.sum");
        let [plain, named, again] = [(); 3].map(|()| tempfile::tempdir().unwrap());
        let read = |dir: &Path| std::fs::read(dir.join(TENSOR_FILE)).unwrap();

        save_adapter(&model, &method(), None, plain.path()).unwrap();
        let mut file = AdapterFile::<Sum>::read(plain.path()).unwrap();
        assert_eq!(file.base_fingerprint, None);
        file.base_fingerprint = Some(fingerprint(&model));
        file.write(named.path()).unwrap();

        let tensors = |dir: &Path| read_values(&dir.join(TENSOR_FILE)).unwrap();
        assert_eq!(tensors(named.path()), tensors(plain.path()));
        for _ in 0..8 {
            assert_eq!(AdapterFile::<Sum>::read(named.path()).unwrap(), file);
            file.write(again.path()).unwrap();
            assert_eq!(read(again.path()), read(named.path()));
        }

        let (loaded, method) = load_adapter::<_, Sum>(base.clone(), named.path()).unwrap();
        save_adapter(&loaded, &method, None, again.path()).unwrap();
        assert_eq!(read(again.path()), read(plain.path()));

        let other = nudged(&base, "down");
        let error = load_adapter::<_, Sum>(other.clone(), named.path()).unwrap_err();
        let message = error.to_string();
        assert!(message.contains(TENSOR_FILE) && message.contains("made on another base"), "{message}");
        let Error::Base { expected, found, .. } = error else { panic!("{message}") };
        assert_eq!((expected, found), (fingerprint(&model), fingerprint(&adapted(&other))));
        load_adapter::<_, Sum>(other, plain.path()).unwrap();
    }
}
