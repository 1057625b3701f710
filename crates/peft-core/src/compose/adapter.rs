//! What adapters compute together where a layer or a sub-layer ends.

use burn::module::{Module, ModuleDisplay, Reparameterization};
use burn::tensor::Tensor;

use super::{Composition, Fusion, total};
use crate::{Activation, Base, End};

/// An adapter as a part of a composition.
pub trait Part: Reparameterization + ModuleDisplay + Activation {
    /// Several of these in one place: a `Vec`, or their values side by side, for one operation over all.
    type Experts: Experts<Self>;

    /// What the adapter sees of the place, and what is added to what it makes of that.
    fn sees(&self, end: &End<'_>) -> (Tensor<3>, Tensor<3>);

    /// What goes on: what the adapter makes of what it [`sees`](Self::sees), with `residual`.
    fn through(&self, seen: Tensor<3>, residual: Tensor<3>) -> Tensor<3>;

    /// What the adapter adds, without dropout and norms behind it: what a fusion looks at.
    fn update(&self, seen: Tensor<3>) -> Tensor<3>;

    /// The end of the place, after the adapter gave `hidden`.
    fn close(&self, hidden: Tensor<3>, end: End<'_>) -> Tensor<3> {
        End { output: hidden, ..end }.close()
    }
}

/// Adapters of one place, each of which counts as far as its gate is open.
pub trait Experts<A>: Module + ModuleDisplay + Sync + 'static {
    /// At least one.
    fn of(experts: Vec<A>) -> Self;

    /// As [`Part::sees`], which is the same for all.
    fn sees(&self, end: &End<'_>) -> (Tensor<3>, Tensor<3>);

    /// What they add together: `Σ gₑ·updateₑ`.
    ///
    /// # Shapes
    /// `seen`: `[batch, seq, d_in]`; `gates`: `[batch · seq, experts]`; result `[batch, seq, d_out]`
    fn mixed(&self, seen: Tensor<3>, gates: Tensor<2>) -> Tensor<3>;

    /// As [`Part::close`], which is the same for all.
    fn close(&self, hidden: Tensor<3>, end: End<'_>) -> Tensor<3> {
        End { output: hidden, ..end }.close()
    }
}

/// One after the other, for adapters that see what is as wide as what they add, as those between layers do.
impl<A: Part> Experts<A> for Vec<A> {
    fn of(experts: Vec<A>) -> Self {
        experts
    }

    fn sees(&self, end: &End<'_>) -> (Tensor<3>, Tensor<3>) {
        self[0].sees(end)
    }

    fn mixed(&self, seen: Tensor<3>, gates: Tensor<2>) -> Tensor<3> {
        let ([batch, seq, _], nothing) = (seen.dims(), seen.zeros_like());
        // Not `update`, so that what an expert has behind it acts as it does alone.
        let each = self.iter().enumerate().map(|(at, expert)| {
            let update = expert.through(seen.clone(), nothing.clone());
            let gate = gates.clone().narrow(1, at, 1).reshape([batch, seq, 1]).cast(update.dtype());
            update * gate
        });
        each.reduce(|sum, update| sum + update).expect("an expert at least")
    }

    fn close(&self, hidden: Tensor<3>, end: End<'_>) -> Tensor<3> {
        self[0].close(hidden, end)
    }
}

/// State of a [`ComposedConfig`](crate::ComposedConfig) at one place.
#[derive(Module, Debug)]
pub struct ComposedAdapter<A: Module> {
    /// The adapters; `None` for one that is not at this place.
    parts: Vec<Option<A>>,
    fusion: Option<Fusion>,
    #[module(skip)]
    composition: Composition,
}

/// The weight form: weights that add up, and the mean of adapted weights. Whatever else a composition does is refused where only weights are.
impl<A: Part> Reparameterization for ComposedAdapter<A> {
    const NAME: &'static str = "composition";

    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        self.weight(&self.composition, base)
    }
}

impl<A: Part> Activation for ComposedAdapter<A> {
    fn linear(&self, x: Tensor<2>, base: &Base<'_>) -> Option<Tensor<2>> {
        Some(self.end(&self.composition, base.end(x)).flatten(0, 1))
    }

    fn shift(&self, bias: Option<&Tensor<1>>) -> Option<Tensor<1>> {
        self.sum(&self.composition, bias)
    }

    fn sub_layer(&self, end: End<'_>) -> Tensor<3> {
        self.end(&self.composition, end)
    }

    fn embedded(&self, x: Tensor<2>) -> Tensor<2> {
        match self.first() {
            Some(first) => first.embedded(x),
            None => x,
        }
    }

    fn unembedded(&self, x: Tensor<2>) -> Tensor<2> {
        match self.first() {
            Some(first) => first.unembedded(x),
            None => x,
        }
    }
}

impl<A: Part> ComposedAdapter<A> {
    pub(super) fn new(parts: Vec<Option<A>>, fusion: Option<Fusion>, composition: Composition) -> Self {
        Self { parts, fusion, composition }
    }

    fn first(&self) -> Option<&A> {
        self.parts[self.composition.first()?].as_ref()
    }

    /// The whole end of a place. Parts of a batch or a sequence end each for itself, so that each is what its adapter alone would make of it.
    fn end(&self, composition: &Composition, end: End<'_>) -> Tensor<3> {
        let [batch, seq, _] = end.output.dims();
        match composition {
            Composition::BatchSplit(parts) => self.parts_of(parts, 0, batch, end),
            Composition::Split(parts) => self.parts_of(parts, 1, seq, end),
            Composition::Parallel(parts) => {
                let equal = |part: &Composition| (batch / parts.len(), part.clone());
                self.parts_of(&parts.iter().map(equal).collect::<Vec<_>>(), 0, batch, end)
            }
            _ => match self.last(composition) {
                Some(last) => last.close(self.hidden(composition, end.clone()), end),
                None => end.close(),
            },
        }
    }

    /// What goes on behind adapters that see all of the input.
    fn hidden(&self, composition: &Composition, end: End<'_>) -> Tensor<3> {
        match composition {
            Composition::Adapter(number) => match &self.parts[*number] {
                Some(part) => {
                    let (seen, residual) = part.sees(&end);
                    part.through(seen, residual)
                }
                None => end.output,
            },
            Composition::Stack(parts) => {
                parts.iter().fold(end.output.clone(), |output, part| self.hidden(part, End { output, ..end.clone() }))
            }
            Composition::Average(parts) => mean(parts, |part| self.hidden(part, end.clone())),
            Composition::Fuse(numbers) => self.fused(numbers, end),
            Composition::BatchSplit(_) | Composition::Parallel(_) | Composition::Split(_) => {
                unreachable!("`check` lets parts of the input be at the outside only")
            }
        }
    }

    fn fused(&self, numbers: &[usize], end: End<'_>) -> Tensor<3> {
        let parts: Vec<&A> = numbers.iter().filter_map(|number| self.parts[*number].as_ref()).collect();
        let (Some(fusion), Some(last)) = (&self.fusion, parts.last()) else { return end.output };
        let (seen, residual) = last.sees(&end);
        let updates = parts.iter().map(|part| part.update(seen.clone())).collect();
        fusion.forward(seen, updates, residual)
    }

    /// The adapter whose form the end of the place has.
    fn last(&self, composition: &Composition) -> Option<&A> {
        composition.numbers().into_iter().rev().find_map(|number| self.parts[number].as_ref())
    }

    fn parts_of(&self, parts: &[(usize, Composition)], dim: usize, length: usize, end: End<'_>) -> Tensor<3> {
        let whole: usize = parts.iter().map(|(count, _)| count).sum();
        assert_eq!(whole, length, "composition: the parts of dimension {dim} of {:?}", end.output.dims());
        let mut start = 0;
        let part = |(count, part): &(usize, Composition)| {
            let narrow = |x: &Tensor<3>| x.clone().narrow(dim, start, *count);
            let own = End { output: narrow(&end.output), input: narrow(&end.input), ..end.clone() };
            start += count;
            self.end(part, own)
        };
        Tensor::cat(parts.iter().map(part).collect(), dim)
    }

    /// The adapted weight.
    fn weight<const D: usize>(&self, composition: &Composition, base: Tensor<D>) -> Tensor<D> {
        match composition {
            Composition::Adapter(number) => match &self.parts[*number] {
                Some(part) => part.apply(base),
                None => base,
            },
            Composition::Stack(parts) => parts.iter().fold(base, |base, part| self.weight(part, base)),
            Composition::Average(parts) => mean(parts, |part| self.weight(part, base.clone())),
            _ => base,
        }
    }

    /// What the adapters of a sum of weights add to the output besides.
    fn sum(&self, composition: &Composition, bias: Option<&Tensor<1>>) -> Option<Tensor<1>> {
        let add = |sum: Tensor<1>, each| sum + each;
        match composition {
            Composition::Adapter(number) => self.parts[*number].as_ref()?.shift(bias),
            Composition::Stack(parts) => parts.iter().filter_map(|part| self.sum(part, bias)).reduce(add),
            Composition::Average(parts) => {
                let whole = total(parts);
                let weighted = |(weight, part): &(f64, Composition)| Some(self.sum(part, bias)? * (weight / whole));
                parts.iter().filter_map(weighted).reduce(add)
            }
            _ => None,
        }
    }
}

/// The weighted mean of what `of` gives for each part.
fn mean<const D: usize>(parts: &[(f64, Composition)], of: impl Fn(&Composition) -> Tensor<D>) -> Tensor<D> {
    let whole = total(parts);
    let weighted = parts.iter().map(|(weight, part)| of(part) * (weight / whole));
    weighted.reduce(|sum, each| sum + each).expect("`check` asks for an adapter at least")
}
