//! Errors and their causes in one line.

use std::error::Error;

/// The error's text, followed by each cause that the text does not contain already.
pub(crate) fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let cause = error.to_string();
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[derive(Debug, thiserror::Error)]
    enum Failure {
        #[error("cannot listen: {0}")]
        Containing(#[source] io::Error),
        #[error("cannot listen")]
        Bare(#[source] io::Error),
    }

    #[test]
    fn each_cause_is_in_the_line_once() {
        let cause = || io::Error::other("address in use");
        for error in [Failure::Containing(cause()), Failure::Bare(cause())] {
            assert_eq!(with_causes(&error), "cannot listen: address in use");
        }
    }
}
