//! Charts of lines, two beside each other.

use std::path::Path;

use plotters::chart::SeriesLabelPosition;
use plotters::coord::Shift;
use plotters::prelude::*;

use crate::Outcome;

/// Lines over the same values.
pub(crate) struct Chart<'a> {
    pub(crate) title: &'a str,
    /// What the values are of.
    pub(crate) of: &'a str,
    pub(crate) lines: Vec<Line>,
    /// Where the names of the lines leave them visible.
    pub(crate) legend: SeriesLabelPosition,
}

pub(crate) struct Line {
    name: String,
    pub(crate) points: Vec<(f64, f64)>,
}

impl Line {
    pub(crate) fn new(name: &str) -> Self {
        Self { name: name.to_owned(), points: Vec::new() }
    }
}

pub(crate) fn draw(out: &Path, charts: &[Chart<'_>]) -> Outcome<()> {
    let rows = charts.len().div_ceil(2);
    let root = SVGBackend::new(out, (960, 320 * rows as u32)).into_drawing_area();
    root.fill(&WHITE).map_err(|e| e.to_string())?;
    for (area, chart) in root.split_evenly((rows, 2)).iter().zip(charts) {
        draw_one(area, chart)?;
    }
    Ok(root.present().map_err(|e| e.to_string())?)
}

fn draw_one(area: &DrawingArea<SVGBackend<'_>, Shift>, chart: &Chart<'_>) -> Outcome<()> {
    let Chart { title, of, lines, legend: place } = chart;
    let largest = |of: fn(&(f64, f64)) -> f64| lines.iter().flat_map(|line| &line.points).map(of).fold(0.0, f64::max);
    let (last, highest) = (largest(|(x, _)| *x), largest(|(_, y)| *y));
    let mut chart = ChartBuilder::on(area)
        .margin(12)
        .caption(title, ("sans-serif", 16))
        .x_label_area_size(34)
        .y_label_area_size(52)
        .build_cartesian_2d(0.0..1.05 * last, 0.0..1.1 * highest)
        .map_err(|e| e.to_string())?;
    let mut draw_lines = || -> Result<(), DrawingAreaErrorKind<_>> {
        chart.configure_mesh().x_desc(*of).light_line_style(BLACK.mix(0.05)).draw()?;
        for (at, line) in lines.iter().enumerate() {
            let color = [RGBColor(0x1f, 0x77, 0xb4), RGBColor(0xe6, 0x6a, 0x00), RGBColor(0x55, 0x55, 0x55)][at % 3];
            // Of lines that fall together, the lower ones are wider.
            let width = 2 * (lines.len() - at) as u32;
            let drawn = LineSeries::new(line.points.iter().copied(), color.stroke_width(width)).point_size(width + 1);
            let legend = move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2));
            chart.draw_series(drawn)?.label(&line.name).legend(legend);
        }
        chart
            .configure_series_labels()
            .position(place.clone())
            .background_style(WHITE.mix(0.85))
            .border_style(BLACK.mix(0.2))
            .draw()
    };
    Ok(draw_lines().map_err(|e| e.to_string())?)
}
