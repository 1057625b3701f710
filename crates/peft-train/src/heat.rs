//! A table of shaded cells as an SVG picture.

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::{Error, Result};

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = std::result::Result<(), String>;

/// Room for the names of rows on the left, and of columns below.
const LEFT: i32 = 150;
const BELOW: i32 = 60;
const ABOVE: i32 = 40;
/// What all cells of a row or a column take together, as far as there are not too many.
const SIDE: i32 = 480;
/// Cells too small for their numbers have none.
const NUMBERED: i32 = 26;

/// A row of cells, which may have fewer than others.
pub(crate) struct Row {
    pub(crate) name: String,
    pub(crate) cells: Vec<Cell>,
}

pub(crate) struct Cell {
    /// How dark it is, from zero to one.
    pub(crate) part: f64,
    pub(crate) text: String,
}

/// Draws rows of cells under a title, with names below the columns.
///
/// # Errors
/// When there is nothing to draw.
pub(crate) fn heat_map(title: &str, columns: &[String], rows: &[Row]) -> Result<String> {
    if columns.is_empty() || rows.is_empty() {
        return Err(Error::setting("plot", "there is nothing to draw"));
    }
    let mut svg = String::new();
    draw(&mut svg, title, columns, rows).map_err(|e| Error::setting("plot", e))?;
    Ok(svg)
}

fn draw(svg: &mut String, title: &str, columns: &[String], rows: &[Row]) -> Drawn {
    let (across, down) = (columns.len() as i32, rows.len() as i32);
    let (width, height) = ((SIDE / across).clamp(8, 80), (SIDE / down).clamp(8, 80));
    let size = ((LEFT + across * width + 20) as u32, (ABOVE + down * height + BELOW) as u32);
    let area = SVGBackend::with_string(svg, size).into_drawing_area();
    area.fill(&WHITE).map_err(|e| e.to_string())?;
    text(&area, title, (LEFT + across * width / 2, ABOVE / 2), 16, HPos::Center, &BLACK)?;
    for (at, row) in rows.iter().enumerate() {
        let top = ABOVE + at as i32 * height;
        for (column, cell) in row.cells.iter().enumerate() {
            let left = LEFT + column as i32 * width;
            let shade = RGBColor(0x1f, 0x77, 0xb4).mix(cell.part.clamp(0.0, 1.0));
            let corners = [(left, top), (left + width, top + height)];
            area.draw(&Rectangle::new(corners, shade.filled())).map_err(|e| e.to_string())?;
            area.draw(&Rectangle::new(corners, BLACK.mix(0.15))).map_err(|e| e.to_string())?;
            if width >= NUMBERED && height >= NUMBERED {
                let colour = if cell.part > 0.6 { WHITE } else { BLACK };
                text(&area, &cell.text, (left + width / 2, top + height / 2), 12, HPos::Center, &colour)?;
            }
        }
        text(&area, &short(&row.name, 20), (LEFT - 8, top + height / 2), height.clamp(7, 13), HPos::Right, &BLACK)?;
    }
    for (at, column) in columns.iter().enumerate() {
        let name = short(column, (width / 7).max(1) as usize);
        let place = (LEFT + at as i32 * width + width / 2, ABOVE + down * height + 14);
        text(&area, &name, place, width.clamp(7, 13), HPos::Center, &BLACK)?;
    }
    area.present().map_err(|e| e.to_string())
}

fn text(area: &Area<'_>, text: &str, at: (i32, i32), size: i32, across: HPos, colour: &RGBColor) -> Drawn {
    let style = ("sans-serif", size).into_font().color(colour).pos(Pos::new(across, VPos::Center));
    area.draw(&Text::new(text.to_owned(), at, style)).map_err(|e| e.to_string())
}

/// At most that many characters.
fn short(label: &str, most: usize) -> String {
    if label.chars().count() <= most {
        return label.to_owned();
    }
    label.chars().take(most.saturating_sub(1)).chain(['…']).collect()
}
