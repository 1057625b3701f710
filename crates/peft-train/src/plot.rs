//! The loss curve as an SVG picture.

use plotters::prelude::*;

use crate::{Error, Record, Result};

/// Draws training loss (thin: each step; thick: running mean) and held-out loss (dots) over steps.
///
/// # Errors
/// When there is nothing to draw.
pub fn loss_curve(records: &[Record]) -> Result<String> {
    let steps: Vec<(f64, f64)> = records
        .iter()
        .filter_map(|r| match r {
            Record::Step(s) => Some((s.step as f64, s.loss)),
            Record::Eval(_) | Record::Experts(_) => None,
        })
        .collect();
    let held_out: Vec<(f64, f64)> = records
        .iter()
        .filter_map(|r| match r {
            Record::Eval(e) => Some((e.step as f64, e.evaluation.loss)),
            Record::Step(_) | Record::Experts(_) => None,
        })
        .collect();
    let all = || steps.iter().chain(&held_out);
    if all().next().is_none() {
        return Err(Error::setting("metrics", "there is no step to draw"));
    }
    let extent = |values: &dyn Fn(&(f64, f64)) -> f64| {
        let (low, high) = all().map(values).fold((f64::MAX, f64::MIN), |(l, h), v| (l.min(v), h.max(v)));
        let margin = ((high - low) * 0.05).max(0.01);
        (low - margin)..(high + margin)
    };
    let (x, y) = (extent(&|p| p.0), extent(&|p| p.1));
    let mut svg = String::new();
    draw(&mut svg, x, y, &steps, &held_out).map_err(|e| Error::setting("plot", e))?;
    Ok(svg)
}

fn draw(
    svg: &mut String,
    x: std::ops::Range<f64>,
    y: std::ops::Range<f64>,
    steps: &[(f64, f64)],
    held_out: &[(f64, f64)],
) -> std::result::Result<(), String> {
    let text = |e: DrawingAreaErrorKind<_>| e.to_string();
    let root = SVGBackend::with_string(svg, (800, 450)).into_drawing_area();
    root.fill(&WHITE).map_err(text)?;
    let mut chart = ChartBuilder::on(&root)
        .margin(16)
        .caption("Loss", ("sans-serif", 18))
        .x_label_area_size(36)
        .y_label_area_size(48)
        .build_cartesian_2d(x, y)
        .map_err(text)?;
    chart
        .configure_mesh()
        .x_desc("optimizer step")
        .x_label_formatter(&|step| format!("{step:.0}"))
        .light_line_style(BLACK.mix(0.05))
        .draw()
        .map_err(text)?;
    let blue = RGBColor(0x1f, 0x77, 0xb4);
    let orange = RGBColor(0xe6, 0x6a, 0x00);
    chart.draw_series(LineSeries::new(steps.iter().copied(), blue.mix(0.25))).map_err(text)?;
    chart
        .draw_series(LineSeries::new(smooth(steps), blue.stroke_width(2)))
        .map_err(text)?
        .label("training")
        .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], blue.stroke_width(2)));
    chart
        .draw_series(LineSeries::new(held_out.iter().copied(), orange.stroke_width(2)).point_size(3))
        .map_err(text)?
        .label("held out")
        .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], orange.stroke_width(2)));
    chart
        .configure_series_labels()
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.2))
        .draw()
        .map_err(text)?;
    root.present().map_err(text)
}

/// Exponential running mean with a tenth of the run as its memory.
fn smooth(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let weight = (10.0 / points.len().max(1) as f64).clamp(0.02, 1.0);
    let mut mean = points.first().map_or(0.0, |p| p.1);
    points
        .iter()
        .map(|(x, y)| {
            mean += weight * (y - mean);
            (*x, mean)
        })
        .collect()
}
