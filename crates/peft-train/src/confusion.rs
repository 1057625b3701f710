//! A confusion matrix as an SVG picture.

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::measures::Confusion;
use crate::{Error, Result};

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = std::result::Result<(), String>;

/// Room for the names of labels on the left, and below the matrix.
const LEFT: i32 = 150;
const BELOW: i32 = 60;
const ABOVE: i32 = 40;
/// Cells too small for their numbers have none.
const NUMBERED: i32 = 26;

/// Draws a row for each true label and a column for each that was found; the darker a cell, the larger its part of the row.
///
/// # Errors
/// When there is nothing to draw.
pub fn confusion_matrix(confusion: &Confusion) -> Result<String> {
    if confusion.labels().is_empty() {
        return Err(Error::setting("plot", "there is no label to draw"));
    }
    let mut svg = String::new();
    draw(&mut svg, confusion).map_err(|e| Error::setting("plot", e))?;
    Ok(svg)
}

fn draw(svg: &mut String, confusion: &Confusion) -> Drawn {
    let count = confusion.labels().len() as i32;
    let cell = (480 / count).clamp(8, 80);
    let size = ((LEFT + count * cell + 20) as u32, (ABOVE + count * cell + BELOW) as u32);
    let area = SVGBackend::with_string(svg, size).into_drawing_area();
    area.fill(&WHITE).map_err(|e| e.to_string())?;
    let middle = (LEFT + count * cell / 2, ABOVE / 2);
    text(&area, "found (columns) for what is true (rows)", middle, 16, HPos::Center, &BLACK)?;
    for (row, (label, counts)) in confusion.labels().iter().zip(confusion.counts()).enumerate() {
        let top = ABOVE + row as i32 * cell;
        let support = counts.iter().sum::<usize>().max(1);
        for (column, found) in counts.iter().enumerate() {
            let left = LEFT + column as i32 * cell;
            let part = *found as f64 / support as f64;
            let shade = RGBColor(0x1f, 0x77, 0xb4).mix(part);
            let corners = [(left, top), (left + cell, top + cell)];
            area.draw(&Rectangle::new(corners, shade.filled())).map_err(|e| e.to_string())?;
            area.draw(&Rectangle::new(corners, BLACK.mix(0.15))).map_err(|e| e.to_string())?;
            if cell >= NUMBERED {
                let colour = if part > 0.6 { WHITE } else { BLACK };
                text(&area, &found.to_string(), (left + cell / 2, top + cell / 2), 12, HPos::Center, &colour)?;
            }
        }
        let size = cell.clamp(7, 13);
        text(&area, &short(label, 20), (LEFT - 8, top + cell / 2), size, HPos::Right, &BLACK)?;
        let name = short(label, (cell / 7).max(1) as usize);
        text(
            &area,
            &name,
            (LEFT + row as i32 * cell + cell / 2, ABOVE + count * cell + 14),
            size,
            HPos::Center,
            &BLACK,
        )?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cell_has_its_number() {
        let labels = ["negative".to_owned(), "<positive>".to_owned()];
        let mut confusion = Confusion::new(&labels);
        for (found, truth, times) in [(0, 0, 31), (1, 0, 7), (0, 1, 5), (1, 1, 23)] {
            (0..times).for_each(|_| confusion.count(found, truth));
        }
        let svg = confusion_matrix(&confusion).unwrap();
        for text in ["31", "7", "5", "23", "negative", "&lt;positive&gt;"] {
            assert!(svg.contains(&format!("\n{text}\n")), "{text} is missing in {svg}");
        }
        assert_eq!(svg.matches("<rect").count(), 1 + 2 * 4);
        assert!(confusion_matrix(&Confusion::new(&[])).is_err());
    }

    #[test]
    fn many_labels_have_small_cells() {
        let labels: Vec<String> = (0..100).map(|at| format!("a long name of label {at}")).collect();
        let svg = confusion_matrix(&Confusion::new(&labels)).unwrap();
        assert!(svg.contains("a long name of labe…"));
    }
}
