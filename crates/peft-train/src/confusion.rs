//! A confusion matrix as an SVG picture.

use crate::Result;
use crate::heat::{Cell, Row, heat_map};
use crate::measures::Confusion;

/// Draws a row for each true label and a column for each that was found; the darker a cell, the larger its part of the row.
///
/// # Errors
/// When there is nothing to draw.
pub fn confusion_matrix(confusion: &Confusion) -> Result<String> {
    let rows: Vec<Row> = (confusion.labels().iter().zip(confusion.counts()))
        .map(|(label, counts)| {
            let support = counts.iter().sum::<usize>().max(1);
            let cell = |found: &usize| Cell { part: *found as f64 / support as f64, text: found.to_string() };
            Row { name: label.clone(), cells: counts.iter().map(cell).collect() }
        })
        .collect();
    heat_map("found (columns) for what is true (rows)", confusion.labels(), &rows)
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
