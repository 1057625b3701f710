//! Where a traversal stands: the bridge between Burn's parameter paths and Hugging Face's names.

use crate::named::NAMED;
use crate::quantized::PACKED;
use crate::sub_layer::PLACE;

/// What the layer around a parameter is, as far as adapters care.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LayerKind {
    /// `nn::Linear`: weight `[d_in, d_out]` here, `[d_out, d_in]` in Hugging Face files.
    Linear,
    /// A linear layer whose files hold `[d_in, d_out]` too, as GPT-2's `Conv1D`: any struct of that name with `weight` and `bias`.
    Conv1D,
    /// [`GroupedLinear`](crate::GroupedLinear): weights `[experts, d_out, d_in]` in both, by the name of the layer.
    GroupedLinear,
    /// `nn::Embedding`: weight `[n_embedding, d_model]` in both.
    Embedding,
    /// `nn::LayerNorm`: scale `[width]`, and a shift.
    LayerNorm,
    /// `nn::RmsNorm`: scale `[width]`.
    RmsNorm,
    /// `nn::conv::Conv2d`: weight `[channels_out, channels_in, height, width]` in both.
    Conv2d,
    /// [`SubLayer`](crate::SubLayer): no weight at all, but the place where a sub-layer of a block ends.
    SubLayer,
    /// [`Embedded`](crate::Embedded): no weight at all, but the place behind a model's embeddings.
    Embedded,
    /// [`Prompts`](crate::Prompts): no weight at all, but the place of learned inputs.
    Prompts,
    /// [`Attended`](crate::Attended): no weight at all, but the place beside the result of a decoder's attention.
    Attended,
    /// [`FeedForward`](crate::FeedForward): no weight at all, but the place around a gated feed-forward part, from its width to its inner one.
    FeedForward,
}

impl LayerKind {
    /// All of them.
    pub(crate) const ALL: [Self; 12] = [
        Self::Linear,
        Self::Conv1D,
        Self::GroupedLinear,
        Self::Embedding,
        Self::LayerNorm,
        Self::RmsNorm,
        Self::Conv2d,
        Self::SubLayer,
        Self::Embedded,
        Self::Prompts,
        Self::Attended,
        Self::FeedForward,
    ];

    fn of(container: &str) -> Option<Self> {
        match container {
            "Struct:Linear" => Some(Self::Linear),
            "Struct:Conv1D" => Some(Self::Conv1D),
            "Struct:GroupedLinear" => Some(Self::GroupedLinear),
            "Struct:Embedding" => Some(Self::Embedding),
            "Struct:LayerNorm" => Some(Self::LayerNorm),
            "Struct:RmsNorm" => Some(Self::RmsNorm),
            "Struct:Conv2d" => Some(Self::Conv2d),
            "Struct:SubLayer" => Some(Self::SubLayer),
            "Struct:Embedded" => Some(Self::Embedded),
            "Struct:Prompts" => Some(Self::Prompts),
            "Struct:Attended" => Some(Self::Attended),
            "Struct:FeedForward" => Some(Self::FeedForward),
            _ => None,
        }
    }

    /// Whether the layer multiplies by a matrix.
    pub fn multiplies(self) -> bool {
        matches!(self, Self::Linear | Self::Conv1D)
    }

    /// Whether its weight can be packed: that of what multiplies by a matrix, or by one for each expert.
    pub fn packs(self) -> bool {
        self.multiplies() || self == Self::GroupedLinear
    }

    /// Whether it is there only for an adapter to sit in.
    pub fn is_place(self) -> bool {
        matches!(self, Self::SubLayer | Self::Embedded | Self::Prompts | Self::Attended | Self::FeedForward)
    }

    /// The name of the parameter that an adapter of such a layer sits in.
    pub(crate) fn weight(self) -> &'static str {
        match self {
            Self::Linear | Self::Conv1D | Self::GroupedLinear | Self::Embedding | Self::Conv2d => WEIGHT,
            Self::LayerNorm | Self::RmsNorm => "gamma",
            Self::SubLayer | Self::Embedded | Self::Prompts | Self::Attended | Self::FeedForward => PLACE,
        }
    }

    /// What an adapter of such a layer can sit in: input features and output features of a parameter of that name and shape.
    pub(crate) fn features(self, param: &str, shape: &[usize]) -> Option<(usize, usize)> {
        if param != self.weight() {
            return None;
        }
        match (self, shape) {
            (Self::Linear | Self::Conv1D | Self::Embedding | Self::FeedForward, [d_in, d_out]) => Some((*d_in, *d_out)),
            (Self::GroupedLinear, [_, d_out, d_in]) => Some((*d_in, *d_out)),
            (Self::LayerNorm | Self::RmsNorm, [width]) => Some((*width, *width)),
            (place, [width]) if place.is_place() => Some((*width, *width)),
            (Self::Conv2d, [d_out, rest @ ..]) => Some((rest.iter().product(), *d_out)),
            _ => None,
        }
    }
}

/// The path stack of a [`burn::module::ModuleVisitor`] or [`burn::module::ModuleMapper`]: forward `enter_module` and `exit_module` to it.
#[derive(Clone, Debug, Default)]
pub struct PathStack {
    levels: Vec<Level>,
}

#[derive(Clone, Debug)]
struct Level {
    name: String,
    container: String,
    /// Whether it belongs to the packed form of a weight, which takes the weight's own path.
    packing: bool,
}

/// Where a parameter lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Location {
    /// Path of the module that owns the parameter, or that owns the adapted weight: `model.layers.0.self_attn.q_proj`.
    pub module: String,
    /// Type name of that module, for instance `Linear`.
    pub container: String,
    /// The module's kind, if it is one that adapters know.
    pub kind: Option<LayerKind>,
    /// Name of the parameter in the module, for instance `weight`.
    pub param: String,
    /// Inside an adapter: the path of the adapter's own field, for instance `a`.
    pub field: Option<String>,
}

impl PathStack {
    /// To be called from `enter_module`.
    ///
    /// The name of an enum's variant is not part of the path: `transformers` knows no such level. Nor are the levels of a packed weight, whose
    /// adapter sits at the weight's own path. A [`Named`](crate::Named) module renames the level above.
    pub fn enter(&mut self, name: &str, container: &str) {
        let name = match self.levels.last_mut() {
            Some(field) if container == NAMED => {
                name.clone_into(&mut field.name);
                String::new()
            }
            _ if container.starts_with("Enum:") => String::new(),
            _ => name.to_owned(),
        };
        let packing = if container == REPARAMETERIZATION { name == PACKED } else { self.in_packing() };
        self.levels.push(Level { name, container: container.to_owned(), packing });
    }

    /// To be called from `exit_module`.
    pub fn exit(&mut self) {
        self.levels.pop();
    }

    /// The dotted path.
    pub fn path(&self) -> String {
        join(&self.kept())
    }

    /// The path without its last component.
    pub fn parent(&self) -> String {
        let kept = self.kept();
        join(&kept[..kept.len().saturating_sub(1)])
    }

    /// Whether what is visited is part of a weight's packed form, the adapter on it apart.
    pub fn in_packing(&self) -> bool {
        self.levels.last().is_some_and(|level| level.packing)
    }

    /// Where the parameter that is being visited lives.
    pub fn locate(&self) -> Location {
        let kept = self.kept();
        let adapter = kept.iter().position(|level| level.container == REPARAMETERIZATION);
        let end = adapter.unwrap_or(kept.len());
        let last = end.saturating_sub(1);
        let container = kept.get(last).map_or("", |level| level.container.as_str());
        Location {
            module: join(&kept[..last]),
            container: container.split_once(':').map_or(container, |(_, name)| name).to_owned(),
            kind: LayerKind::of(container),
            param: kept.get(last).map(|level| level.name.clone()).unwrap_or_default(),
            field: adapter.map(|at| join(&kept[at + 1..])),
        }
    }

    fn kept(&self) -> Vec<&Level> {
        self.levels.iter().filter(|level| !level.packing).collect()
    }
}

/// What Burn calls the level of an adapter.
pub(crate) const REPARAMETERIZATION: &str = "Reparameterization";

fn join(levels: &[&Level]) -> String {
    let names = levels.iter().map(|level| level.name.as_str()).filter(|name| !name.is_empty());
    names.collect::<Vec<_>>().join(".")
}

/// What layers call what they multiply by.
const WEIGHT: &str = "weight";

/// What linear layers and convolutions call what they add, and what norms call it.
const BIAS: &str = "bias";
const BETA: &str = "beta";

impl Location {
    /// Whether the parameter is there only for an adapter to sit in.
    pub(crate) fn is_place(&self) -> bool {
        self.field.is_none() && self.kind.is_some_and(LayerKind::is_place)
    }

    /// Whether the parameter is what the layer adds to its output.
    pub(crate) fn is_bias(&self) -> bool {
        self.field.is_none() && (self.param == BIAS || self.param == BETA)
    }
}

/// A parameter's name and orientation in Hugging Face files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HfName {
    /// For instance `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// Whether the file holds the transpose.
    pub transposed: bool,
}

/// The number of the block that the layer at `path` is in: `model.layers.3.mlp` is in block 3. Nothing for one that is in none.
pub fn block_of(path: &str) -> Option<usize> {
    path.split('.').find_map(|part| part.parse().ok())
}

/// How Hugging Face `transformers` names a base parameter of rank `rank`, given that modules carry the same names here and there.
///
/// Linear weights are transposed, Burn's `gamma` and `beta` of norms are `weight` and `bias`, and the weights of several experts have the name of their layer.
pub fn hf_name(location: &Location, rank: usize) -> HfName {
    let param = match location.param.as_str() {
        "gamma" => WEIGHT,
        BETA => BIAS,
        other => other,
    };
    let whole = location.kind == Some(LayerKind::GroupedLinear) && param == WEIGHT;
    let name = if whole {
        location.module.clone()
    } else if location.module.is_empty() {
        param.to_owned()
    } else {
        format!("{}.{param}", location.module)
    };
    HfName { name, transposed: location.kind == Some(LayerKind::Linear) && rank == 2 }
}
