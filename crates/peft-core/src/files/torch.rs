//! PyTorch's `.bin` files, read without running anything: a zip archive of raw numbers, and a pickle that says which tensor they are.
//!
//! A pickle is a program for a stack machine. What tensors are made of is understood here; whatever else it asks for ends the reading.

use std::collections::{BTreeMap, HashMap};
use std::io::{Cursor, Read};
use std::path::Path;
use std::rc::Rc;

use safetensors::Dtype;

use super::{Values, decode};
use crate::{Error, Result};

/// The tensors of a `.bin` file, which must be finite floats.
///
/// # Errors
/// When the file cannot be read, is of PyTorch before 1.6, or holds anything but tensors by name.
pub fn read_torch(path: &Path) -> Result<BTreeMap<String, Values>> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    let malformed = |what: String| Error::format(path, what);
    let mut archive = Archive::open(&bytes).map_err(malformed)?;
    let program = archive.entry("data.pkl").map_err(malformed)?;
    let Value::Dict(entries, _) = &*Machine::new(&program).run().map_err(malformed)? else {
        return Err(malformed("not a dictionary of tensors".to_owned()));
    };
    let mut tensors = BTreeMap::new();
    for (key, value) in entries {
        match (&**key, &**value) {
            (Value::Text(key), Value::Tensor(tensor)) => {
                let values = tensor.values(&mut archive).map_err(|what| malformed(format!("{key}: {what}")))?;
                tensors.insert(key.clone(), values);
            }
            (key, value) => {
                return Err(malformed(format!("expected tensors by name, found {}: {}", key.kind(), value.kind())));
            }
        }
    }
    Ok(tensors)
}

type Outcome<T> = std::result::Result<T, String>;

/// The zip archive. Entries are stored as they are, so none is larger than the file.
struct Archive<'a> {
    inner: zip::ZipArchive<Cursor<&'a [u8]>>,
    /// The folder that everything is in; its name is that of the file that was written.
    root: String,
}

impl<'a> Archive<'a> {
    fn open(bytes: &'a [u8]) -> Outcome<Self> {
        let inner =
            zip::ZipArchive::new(Cursor::new(bytes)).map_err(|e| format!("not a file of PyTorch 1.6 or later: {e}"))?;
        let folder = |name: &str| name.strip_suffix("/data.pkl").map(str::to_owned);
        let root = inner.file_names().find_map(|name| folder(&name.ok()?));
        let root = root.ok_or("not a file of PyTorch: there is no data.pkl in it")?;
        Ok(Self { inner, root })
    }

    fn entry(&mut self, name: &str) -> Outcome<Vec<u8>> {
        let name = format!("{}/{name}", self.root);
        let mut entry = self.inner.by_name(&name).map_err(|e| format!("{name}: {e}"))?;
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).map_err(|e| format!("{name}: {e}"))?;
        Ok(bytes)
    }
}

/// What is on the stack. Shared, as the machine's memory hands out the same value any number of times.
#[derive(Clone)]
enum Value {
    Nothing,
    Flag(bool),
    Number(i64),
    Text(String),
    Tuple(Vec<Rc<Value>>, Depth),
    Dict(Vec<(Rc<Value>, Rc<Value>)>, Depth),
    /// A name in a Python module.
    Global(String),
    Storage(Storage),
    Tensor(Tensor),
}

/// How deep values lie in each other.
type Depth = usize;

/// Tensors need three levels; a program could make millions, and dropping them would overflow the stack of this thread.
const DEEPEST: Depth = 16;

impl Value {
    fn depth(&self) -> Depth {
        match self {
            Self::Tuple(_, depth) | Self::Dict(_, depth) => *depth,
            _ => 0,
        }
    }

    /// What it is, for a message: values may hold each other in numbers that nobody wants to read.
    fn kind(&self) -> String {
        match self {
            Self::Nothing => "None".to_owned(),
            Self::Flag(flag) => format!("the flag {flag}"),
            Self::Number(number) => format!("the number {number}"),
            Self::Text(text) => format!("the text {text:?}"),
            Self::Tuple(values, _) => format!("a tuple of {}", values.len()),
            Self::Dict(entries, _) => format!("a dictionary of {}", entries.len()),
            Self::Global(name) => name.clone(),
            Self::Storage(_) => "a storage".to_owned(),
            Self::Tensor(_) => "a tensor".to_owned(),
        }
    }
}

/// One level above the deepest of `values`.
fn above<'a>(values: impl IntoIterator<Item = &'a Rc<Value>>) -> Outcome<Depth> {
    let depth = values.into_iter().map(|value| value.depth() + 1).max().unwrap_or(0);
    if depth > DEEPEST { Err("its pickle nests deeper than tensors need".to_owned()) } else { Ok(depth) }
}

#[derive(Clone, Debug)]
struct Storage {
    dtype: Dtype,
    /// Its entry in the archive is `data/key`.
    key: String,
}

#[derive(Clone, Debug)]
struct Tensor {
    storage: Storage,
    offset: usize,
    shape: Vec<usize>,
    strides: Vec<usize>,
}

impl Tensor {
    fn values(&self, archive: &mut Archive<'_>) -> Outcome<Values> {
        let bytes = archive.entry(&format!("data/{}", self.storage.key))?;
        let stored = decode(self.storage.dtype, &bytes).ok_or("not a float type")?;
        let count = self.shape.iter().try_fold(1_usize, |count, n| count.checked_mul(*n)).unwrap_or(usize::MAX);
        // A tensor that repeats its numbers could be made as large as one likes.
        if count > stored.len() || self.shape.len() != self.strides.len() {
            return Err(format!("shape {:?} of {} stored numbers", self.shape, stored.len()));
        }
        let place = |at: usize| {
            let mut rest = at;
            let axes = self.shape.iter().zip(&self.strides).rev();
            axes.fold(self.offset, |place, (n, stride)| {
                let index = rest % n;
                rest /= n;
                place.saturating_add(index.saturating_mul(*stride))
            })
        };
        let values: Option<Vec<f32>> = (0..count).map(|at| stored.get(place(at)).copied()).collect();
        let values = values.ok_or("it reaches beyond the stored numbers")?;
        if values.iter().any(|value| !value.is_finite()) {
            return Err("holds a value that is not finite; the training that wrote it diverged".to_owned());
        }
        Ok(Values { shape: self.shape.clone(), values })
    }
}

/// The stack machine, with the operations that PyTorch's own pickles of tensors use.
struct Machine<'a> {
    program: &'a [u8],
    at: usize,
    stack: Vec<Rc<Value>>,
    marks: Vec<usize>,
    memory: HashMap<u32, Rc<Value>>,
}

impl<'a> Machine<'a> {
    fn new(program: &'a [u8]) -> Self {
        Self { program, at: 0, stack: Vec::new(), marks: Vec::new(), memory: HashMap::new() }
    }

    fn run(mut self) -> Outcome<Rc<Value>> {
        loop {
            let [operation] = self.take()?;
            match operation {
                b'.' => return self.pop(),
                0x80 => drop(self.take::<1>()?),
                b'(' => self.marks.push(self.stack.len()),
                b'N' => self.push(Value::Nothing),
                0x88 => self.push(Value::Flag(true)),
                0x89 => self.push(Value::Flag(false)),
                b'K' => self.number(|[byte]: [u8; 1]| byte.into())?,
                b'M' => self.number(|bytes| u16::from_le_bytes(bytes).into())?,
                b'J' => self.number(|bytes| i32::from_le_bytes(bytes).into())?,
                0x8a => self.long()?,
                b'X' => self.text()?,
                b'c' => self.global()?,
                b'q' => self.remember(|machine| Ok(u32::from(machine.take::<1>()?[0])))?,
                b'r' => self.remember(|machine| Ok(u32::from_le_bytes(machine.take()?)))?,
                b'h' => self.recall(|machine| Ok(u32::from(machine.take::<1>()?[0])))?,
                b'j' => self.recall(|machine| Ok(u32::from_le_bytes(machine.take()?)))?,
                b'}' => self.push(Value::Dict(Vec::new(), 0)),
                b')' => self.push(Value::Tuple(Vec::new(), 0)),
                b't' => {
                    let values = self.since_mark()?;
                    self.tuple(values)?;
                }
                0x85..=0x87 => {
                    let values = self.last(usize::from(operation - 0x84))?;
                    self.tuple(values)?;
                }
                b's' => {
                    let (value, key) = (self.pop()?, self.pop()?);
                    self.fill(vec![key, value])?;
                }
                b'u' => {
                    let items = self.since_mark()?;
                    self.fill(items)?;
                }
                b'Q' => self.storage()?,
                b'R' => self.call()?,
                // Attributes of a dictionary, such as the versions of modules.
                b'b' => drop(self.pop()?),
                other => return Err(format!("operation {other:#04x} of its pickle is none that tensors need")),
            }
        }
    }

    fn take<const N: usize>(&mut self) -> Outcome<[u8; N]> {
        let bytes = self.slice(N)?;
        bytes.try_into().map_err(|_| "its pickle ends too early".to_owned())
    }

    fn slice(&mut self, count: usize) -> Outcome<&'a [u8]> {
        let bytes = self.program[self.at..].get(..count).ok_or("its pickle ends too early")?;
        self.at += count;
        Ok(bytes)
    }

    fn push(&mut self, value: Value) {
        self.stack.push(Rc::new(value));
    }

    fn pop(&mut self) -> Outcome<Rc<Value>> {
        self.stack.pop().ok_or_else(|| "its pickle takes from an empty stack".to_owned())
    }

    fn number<const N: usize>(&mut self, read: impl Fn([u8; N]) -> i64) -> Outcome<()> {
        let bytes = self.take()?;
        self.push(Value::Number(read(bytes)));
        Ok(())
    }

    /// A whole number of up to eight bytes.
    fn long(&mut self) -> Outcome<()> {
        let [count] = self.take()?;
        let bytes = self.slice(count.into())?;
        let mut all = [if bytes.last().is_some_and(|byte| byte & 0x80 != 0) { 0xff } else { 0 }; 8];
        all.get_mut(..bytes.len()).ok_or("a number of its pickle is too large")?.copy_from_slice(bytes);
        self.push(Value::Number(i64::from_le_bytes(all)));
        Ok(())
    }

    fn text(&mut self) -> Outcome<()> {
        let count = u32::from_le_bytes(self.take()?);
        let text = std::str::from_utf8(self.slice(count as usize)?).map_err(|e| e.to_string())?;
        self.push(Value::Text(text.to_owned()));
        Ok(())
    }

    fn global(&mut self) -> Outcome<()> {
        let mut line = || {
            let rest = &self.program[self.at..];
            let end = rest.iter().position(|byte| *byte == b'\n').ok_or("its pickle ends too early")?;
            self.at += end + 1;
            std::str::from_utf8(&rest[..end]).map_err(|e| e.to_string())
        };
        let (module, name) = (line()?, line()?);
        self.push(Value::Global(format!("{module}.{name}")));
        Ok(())
    }

    fn remember(&mut self, place: impl Fn(&mut Self) -> Outcome<u32>) -> Outcome<()> {
        let place = place(self)?;
        let value = self.stack.last().ok_or("its pickle remembers nothing")?.clone();
        self.memory.insert(place, value);
        Ok(())
    }

    fn recall(&mut self, place: impl Fn(&mut Self) -> Outcome<u32>) -> Outcome<()> {
        let place = place(self)?;
        let value = self.memory.get(&place).ok_or("its pickle recalls what it never remembered")?.clone();
        self.stack.push(value);
        Ok(())
    }

    fn since_mark(&mut self) -> Outcome<Vec<Rc<Value>>> {
        let mark = self.marks.pop().filter(|mark| *mark <= self.stack.len());
        Ok(self.stack.split_off(mark.ok_or("its pickle has no mark")?))
    }

    fn last(&mut self, count: usize) -> Outcome<Vec<Rc<Value>>> {
        let start = self.stack.len().checked_sub(count).ok_or("its pickle takes from an empty stack")?;
        Ok(self.stack.split_off(start))
    }

    fn tuple(&mut self, values: Vec<Rc<Value>>) -> Outcome<()> {
        let depth = above(&values)?;
        self.push(Value::Tuple(values, depth));
        Ok(())
    }

    /// Puts keys and values in turn into the dictionary below them.
    fn fill(&mut self, items: Vec<Rc<Value>>) -> Outcome<()> {
        let mut dict = self.pop()?;
        let kind = dict.kind();
        let Value::Dict(entries, depth) = Rc::make_mut(&mut dict) else {
            return Err(format!("{kind} is no dictionary"));
        };
        *depth = above(&items)?.max(*depth);
        entries.extend(items.as_chunks().0.iter().map(|[key, value]| (key.clone(), value.clone())));
        self.stack.push(dict);
        Ok(())
    }

    /// `('storage', type, key, device, count)`
    fn storage(&mut self) -> Outcome<()> {
        let value = self.pop()?;
        let storage = match &*value {
            Value::Tuple(parts, _) => match parts.iter().map(|part| &**part).collect::<Vec<_>>()[..] {
                [Value::Text(_), Value::Global(kind), Value::Text(key), ..] => Some((kind.as_str(), key.clone())),
                _ => None,
            },
            _ => None,
        };
        let (kind, key) = storage.ok_or_else(|| format!("{} names no storage", value.kind()))?;
        let dtype = match kind {
            "torch.FloatStorage" => Dtype::F32,
            "torch.HalfStorage" => Dtype::F16,
            "torch.BFloat16Storage" => Dtype::BF16,
            "torch.DoubleStorage" => Dtype::F64,
            other => return Err(format!("expected a float type, found {other}")),
        };
        self.push(Value::Storage(Storage { dtype, key }));
        Ok(())
    }

    /// Python would call anything here. Tensors, parameters and dictionaries are made; nothing else is.
    fn call(&mut self) -> Outcome<()> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        let (Value::Tuple(arguments, _), Value::Global(function)) = (&*arguments, &*function) else {
            return Err("its pickle calls what is no function".to_owned());
        };
        let arguments: Vec<&Value> = arguments.iter().map(|argument| &**argument).collect();
        match (function.as_str(), &arguments[..]) {
            ("collections.OrderedDict", []) => self.push(Value::Dict(Vec::new(), 0)),
            (
                "torch._utils._rebuild_tensor_v2",
                [Value::Storage(storage), Value::Number(offset), Value::Tuple(shape, _), Value::Tuple(strides, _), ..],
            ) => {
                let offset = usize::try_from(*offset).map_err(|_| "a negative offset")?;
                let tensor =
                    Tensor { storage: storage.clone(), offset, shape: sizes(shape)?, strides: sizes(strides)? };
                self.push(Value::Tensor(tensor));
            }
            ("torch._utils._rebuild_parameter", [Value::Tensor(tensor), ..]) => {
                self.push(Value::Tensor(tensor.clone()));
            }
            (other, _) => {
                return Err(format!(
                    "its pickle asks Python to run {other}; only tensors are read, and nothing is run"
                ));
            }
        }
        Ok(())
    }
}

fn sizes(values: &[Rc<Value>]) -> Outcome<Vec<usize>> {
    let size = |value: &Rc<Value>| match &**value {
        Value::Number(number) => usize::try_from(*number).map_err(|_| "a negative size".to_owned()),
        other => Err(format!("{} is no size", other.kind())),
    };
    values.iter().map(size).collect()
}
