//! A table that is drawn again and again at the same place of a terminal.

use std::io::{self, IsTerminal as _, Write as _};

/// Standard output. Where it is no terminal, only the last picture is printed.
pub(super) struct Screen {
    is_terminal: bool,
    /// Number of lines of the picture that is shown.
    drawn: usize,
}

impl Screen {
    /// Standard output, without a picture.
    pub(super) fn new() -> Self {
        Self { is_terminal: io::stdout().is_terminal(), drawn: 0 }
    }

    /// Shows the picture in place of the one before.
    ///
    /// # Errors
    /// When standard output cannot be written.
    pub(super) fn show(
        &mut self,
        is_last: bool,
        picture: impl FnOnce() -> String,
    ) -> io::Result<()> {
        if !self.is_terminal && !is_last {
            return Ok(());
        }
        let picture = picture();
        let mut out = io::stdout().lock();
        if self.drawn > 0 {
            // Moves to the first line of the last picture, and clears everything below.
            write!(out, "\x1b[{}A\x1b[J", self.drawn)?;
        }
        writeln!(out, "{picture}")?;
        out.flush()?;
        self.drawn = picture.lines().count();
        Ok(())
    }
}
