//! Numbers in the spelling of Go, whose labels are compared as texts.

/// A number as Go's client library spells it, such as the `le` of a bucket: in its shortest form,
/// with an exponent below 1e-4 and from 1e6 on.
pub(super) fn go_number(number: f64) -> String {
    if number == f64::INFINITY {
        return "+Inf".to_owned();
    }
    let scientific = format!("{number:e}");
    let exponent = scientific.split_once('e').and_then(|(mantissa, exponent)| {
        let exponent: i32 = exponent.parse().ok()?;
        (!(-4..6).contains(&exponent)).then_some((mantissa, exponent))
    });
    match exponent {
        Some((mantissa, exponent)) => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{mantissa}e{sign}{:02}", exponent.unsigned_abs())
        }
        None => number.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_spelled_as_in_go() {
        for (number, text) in [
            (1e-6, "1e-06"),
            (1e-5, "1e-05"),
            (2.5e-10, "2.5e-10"),
            (1e-4, "0.0001"),
            (0.005, "0.005"),
            (12.5, "12.5"),
            (86_400.0, "86400"),
            (1e6, "1e+06"),
            (f64::INFINITY, "+Inf"),
        ] {
            assert_eq!(go_number(number), text);
        }
    }
}
