//! The header block of a request, checked (RFC 9113 §8).

use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Uri};

use super::hpack::{Decoder, Undecodable};

/// Maximum length of a request's header fields, as HTTP/2 counts them, in bytes.
pub(super) const MAX_FIELDS_LEN: usize = 16 * 1024;
/// What a field costs beside its bytes (RFC 9113 §6.5.2).
const FIELD_COST: usize = 32;
/// Fields that HTTP/2 has no use for (RFC 9113 §8.2.2).
const OF_CONNECTIONS: [&[u8]; 5] =
    [b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"];

/// A decoded header block.
#[derive(Debug, Default)]
pub(super) struct Fields {
    method: Option<Method>,
    path: Option<Uri>,
    has_scheme: bool,
    has_authority: bool,
    map: HeaderMap,
    length: usize,
    is_malformed: bool,
}

/// Why a header block begins no stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    Malformed,
    TooLong,
}

impl Fields {
    /// Decodes a block. It is decoded to its end in any case, as the next one depends on it.
    pub(super) fn decode(decoder: &mut Decoder, block: &[u8]) -> Result<Self, Undecodable> {
        let mut fields = Self::default();
        decoder.decode(block, |name, value| fields.add(name, value))?;
        Ok(fields)
    }

    fn add(&mut self, name: &[u8], value: &[u8]) {
        self.length = self.length.saturating_add(name.len() + value.len() + FIELD_COST);
        if self.length <= MAX_FIELDS_LEN && !self.is_malformed {
            self.is_malformed = self.take(name, value).is_none();
        }
    }

    /// Takes a field; `None` when no request may have it.
    fn take(&mut self, name: &[u8], value: &[u8]) -> Option<()> {
        if name.first() != Some(&b':') {
            let is_legal = !name.iter().any(u8::is_ascii_uppercase)
                && !OF_CONNECTIONS.contains(&name)
                && (name != b"te" || value == b"trailers");
            let name = HeaderName::from_bytes(name).ok().filter(|_| is_legal)?;
            let value = HeaderValue::from_bytes(value).ok()?;
            return self.map.try_append(name, value).ok().map(|_| ());
        }
        // They precede the others, and come once.
        if !self.map.is_empty() {
            return None;
        }
        let is_new = match name {
            b":method" => self.method.replace(Method::from_bytes(value).ok()?).is_none(),
            b":path" => self.path.replace(path(value)?).is_none(),
            b":scheme" => !std::mem::replace(&mut self.has_scheme, true),
            // Not looked at: over a Unix socket, grpc-go sends the socket's path, which is none.
            b":authority" => !std::mem::replace(&mut self.has_authority, true),
            _ => false,
        };
        is_new.then_some(())
    }

    /// The request that the fields make.
    pub(super) fn into_request(self) -> Result<Request<()>, Refused> {
        if self.length > MAX_FIELDS_LEN {
            return Err(Refused::TooLong);
        }
        let (Some(method), Some(path), true, false) =
            (self.method, self.path, self.has_scheme, self.is_malformed)
        else {
            return Err(Refused::Malformed);
        };
        let mut request = Request::new(());
        *request.method_mut() = method;
        *request.uri_mut() = path;
        *request.headers_mut() = self.map;
        Ok(request)
    }

    /// Whether the fields may end a request.
    pub(super) fn are_trailers(&self) -> bool {
        let has_pseudo =
            self.method.is_some() || self.path.is_some() || self.has_scheme || self.has_authority;
        !has_pseudo && !self.is_malformed && self.length <= MAX_FIELDS_LEN
    }
}

fn path(value: &[u8]) -> Option<Uri> {
    (value.starts_with(b"/") || value == b"*").then(|| Uri::try_from(value).ok())?
}

/// The length that a request says its body has.
pub(super) fn content_length<T>(request: &Request<T>) -> Result<Option<u64>, Refused> {
    let mut lengths = request.headers().get_all(http::header::CONTENT_LENGTH).iter();
    let Some(length) = lengths.next() else { return Ok(None) };
    let length = length.to_str().ok().and_then(|length| length.parse().ok());
    match (length, lengths.next()) {
        (Some(length), None) => Ok(Some(length)),
        _ => Err(Refused::Malformed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEGAL: [(&str, &str); 5] = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", "/ProxyService/Proxy"),
        (":authority", "%2Frun%2Fproxy.sock"),
        ("te", "trailers"),
    ];

    fn fields(fields: &[(&str, &str)]) -> Fields {
        let mut found = Fields::default();
        fields.iter().for_each(|(name, value)| found.add(name.as_bytes(), value.as_bytes()));
        found
    }

    #[test]
    fn an_authority_that_is_none_is_accepted() {
        let request = fields(&LEGAL).into_request().unwrap();
        assert_eq!((request.method(), request.uri().path()), (&Method::POST, LEGAL[2].1));
        assert_eq!(request.headers().len(), 1);
    }

    #[test]
    fn each_pseudo_field_comes_once_and_first_and_is_known() {
        for missing in 0..3 {
            let mut some = LEGAL.to_vec();
            some.remove(missing);
            assert_eq!(fields(&some).into_request().unwrap_err(), Refused::Malformed);
        }
        for added in [
            (":method", "GET"),
            (":path", "/"),
            (":scheme", "http"),
            (":authority", "a"),
            (":status", "200"),
            ("x", "y"),
            ("connection", "close"),
            ("te", "gzip"),
            ("Upper", "x"),
            ("na me", "x"),
            ("x", "a\nb"),
        ] {
            let mut first = vec![added];
            first.extend(LEGAL);
            assert_eq!(fields(&first).into_request().unwrap_err(), Refused::Malformed, "{added:?}");
        }
        for path in ["", "x", "/a b"] {
            let mut other = LEGAL;
            other[2].1 = path;
            assert_eq!(fields(&other).into_request().unwrap_err(), Refused::Malformed, "{path}");
        }
    }

    #[test]
    fn long_fields_are_refused_and_not_kept() {
        let long = "x".repeat(MAX_FIELDS_LEN);
        let mut found = fields(&LEGAL);
        found.add(b"long", long.as_bytes());
        assert_eq!(found.map.len(), 1);
        assert_eq!(found.into_request().unwrap_err(), Refused::TooLong);
    }

    #[test]
    fn trailers_have_no_pseudo_fields() {
        assert!(fields(&[("grpc-status", "0")]).are_trailers());
        assert!(fields(&[]).are_trailers());
        assert!(!fields(&[(":path", "/")]).are_trailers());
        assert!(!fields(&[("A", "b")]).are_trailers());
    }

    #[test]
    fn a_body_has_one_length() {
        let length = |lengths: &[&str]| {
            let mut request = Request::new(());
            for length in lengths {
                request
                    .headers_mut()
                    .append("content-length", HeaderValue::from_str(length).unwrap());
            }
            content_length(&request)
        };
        assert_eq!(length(&[]), Ok(None));
        assert_eq!(length(&["7"]), Ok(Some(7)));
        assert_eq!(length(&["-7"]), Err(Refused::Malformed));
        assert_eq!(length(&["7", "7"]), Err(Refused::Malformed));
    }
}
