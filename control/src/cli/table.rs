//! Aligned columns without trailing spaces.

use std::fmt;

/// Rows below a heading.
#[derive(Debug)]
pub(super) struct Table {
    /// The headings; `>` in front of one makes its column flush right, as numbers are.
    columns: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these headings, as in `NAME|>FRAMES|>BYTES`: `>` for columns of numbers.
    pub(super) fn new(headings: &'static str) -> Self {
        Self {
            columns: headings.split('|').collect(),
            rows: Vec::new(),
        }
    }

    /// Adds a row with a cell for each column.
    pub(super) fn row<const N: usize>(&mut self, cells: [String; N]) {
        debug_assert_eq!(cells.len(), self.columns.len());
        self.rows.push(cells.into());
    }

    /// Writes heading and rows.
    pub(super) fn write(&self, out: &mut dyn fmt::Write) -> fmt::Result {
        let headings: Vec<String> = self.columns.iter().map(|h| h.replace('>', "")).collect();
        let rows = || std::iter::once(&headings).chain(&self.rows);
        let width = |at: usize| rows().map(|row| row[at].chars().count()).max();
        let widths: Vec<usize> = (0..headings.len()).filter_map(width).collect();
        for row in rows() {
            let mut line = String::new();
            for ((cell, width), heading) in row.iter().zip(&widths).zip(&self.columns) {
                line.push_str(&match heading.starts_with('>') {
                    true => format!("{cell:>width$}  "),
                    false => format!("{cell:<width$}  "),
                });
            }
            writeln!(out, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_align_and_lines_end_without_spaces() {
        let mut table = Table::new("NAME|>N|X");
        table.row(["a".into(), "1".into(), "long".into()]);
        table.row(["longer".into(), "100".into(), String::new()]);
        let mut out = String::new();
        table.write(&mut out).unwrap();
        assert_eq!(out, "NAME      N  X\na         1  long\nlonger  100\n");
    }
}
