//! Which key of an adapter file belongs to which parameter, and how its values lie there.

use std::collections::{BTreeMap, BTreeSet};

use burn::module::Module;

use super::{Values, transpose};
use crate::{Location, Matcher, Method, PathStack, Problem, Result, Scan, hf_name, scan};

/// The keys of a method's adapter on a module.
pub(super) struct Keys<M> {
    matcher: Matcher,
    pub(super) adapted: BTreeSet<String>,
    stacks: BTreeMap<String, Stack>,
    method: std::marker::PhantomData<M>,
}

/// What PEFT makes of an adapted parameter of several experts.
struct Stack {
    /// The path of its factors: that of the module, which PEFT wraps once for each of its parameters. The last is the outermost.
    path: String,
    experts: usize,
}

/// The key of a parameter.
pub(super) struct Key {
    pub(super) name: String,
    /// Whether the adapter is incomplete without it. PEFT also writes base weights that were not trained, such as an adapted embedding.
    pub(super) required: bool,
    /// Whether the file holds the transpose.
    transposed: bool,
    /// How many experts have a part of it, one under the other. The transpose has columns by rank and then by expert.
    experts: Option<usize>,
}

impl Key {
    /// The shape in the file of a parameter of that shape, and the matrix whose transpose the file holds: of several experts one with a row for each.
    fn form(&self, shape: &[usize]) -> (Vec<usize>, Option<[usize; 2]>) {
        match (self.transposed, self.experts, shape) {
            (true, None, [rows, columns]) => (vec![*columns, *rows], Some([*rows, *columns])),
            (true, Some(experts), [rows, columns]) => {
                let rows = rows / experts;
                (vec![rows, columns * experts], Some([experts, rows * columns]))
            }
            _ => (shape.to_vec(), None),
        }
    }

    /// The shape in the file of a parameter of that shape.
    pub(super) fn shape(&self, shape: &[usize]) -> Vec<usize> {
        self.form(shape).0
    }

    /// The values of a parameter of that shape as the file holds them.
    pub(super) fn to_file(&self, shape: &[usize], values: Vec<f32>) -> Values {
        let (shape, matrix) = self.form(shape);
        let values = match matrix {
            Some([rows, columns]) => transpose(&values, rows, columns),
            None => values,
        };
        Values { shape, values }
    }

    /// The reverse of [`to_file`](Self::to_file).
    pub(super) fn out_of_file(&self, shape: &[usize], values: Vec<f32>) -> Vec<f32> {
        match self.form(shape).1 {
            Some([rows, columns]) => transpose(&values, columns, rows),
            None => values,
        }
    }
}

impl<M: Method> Keys<M> {
    pub(super) fn new<T: Module>(module: &T, method: &M) -> Result<Self> {
        let found = scan(module);
        Ok(Self {
            matcher: method.targets().matcher()?,
            stacks: stacks(&found),
            adapted: found.adapted,
            method: std::marker::PhantomData,
        })
    }

    /// The key of the parameter at this place; `Err` when the method forgot to list one of its fields.
    pub(super) fn key(&self, at: &PathStack, rank: usize) -> std::result::Result<Key, Problem> {
        let location = at.locate();
        let Some(field) = &location.field else { return Ok(self.base_key(&location, rank)) };
        match location.kind.and_then(|kind| M::key(kind, field)) {
            Some((key, transposed)) => {
                let stack = self.stacks.get(&location.module);
                let module = stack.map_or(&location.module, |stack| &stack.path);
                let name = if M::is_of_model(&key) { key } else { format!("{module}.{key}") };
                Ok(Key { name, transposed, experts: stack.map(|stack| stack.experts), required: true })
            }
            None => Err(Problem::Other {
                path: at.path(),
                what: format!("{} does not list this field in `Method::tensors`", M::PEFT_TYPE),
            }),
        }
    }

    fn base_key(&self, location: &Location, rank: usize) -> Key {
        let adapted = self.adapted.contains(&location.module);
        let hf = hf_name(location, rank);
        let param = hf.name.rsplit('.').next().unwrap_or_default();
        let required = self.matcher.trains(&location.module, param, adapted);
        // PEFT keeps the base of an adapted layer one level down.
        let name = if adapted { format!("{}.base_layer.{param}", location.module) } else { hf.name };
        Key { name, transposed: hf.transposed, experts: None, required }
    }
}

/// The adapted parameters of several experts by their paths.
fn stacks(found: &Scan) -> BTreeMap<String, Stack> {
    let (mut stacks, mut wrapped) = (BTreeMap::new(), BTreeMap::<&str, usize>::new());
    for site in found.sites.iter().rev().filter(|site| found.adapted.contains(&site.path)) {
        let Some(experts) = site.experts else { continue };
        let module = site.path.rsplit_once('.').map_or("", |(module, _)| module);
        let outside = wrapped.entry(module).or_default();
        let path = format!("{module}{}", ".base_layer".repeat(*outside));
        *outside += 1;
        stacks.insert(site.path.clone(), Stack { path, experts });
    }
    stacks
}
