//! The proxy between this process and kube-apiserver, by the rules of client-go.

use culvert_transport::tcp::proxy_url;
use hyper::Uri;

/// The proxy of a kubeconfig's cluster or, where it names none, of the environment; `None` when
/// kube-apiserver is reached directly. NO_PROXY does not apply to that of a kubeconfig.
///
/// # Errors
/// With the reason for which the proxy cannot be used. It quotes nothing, for there may be a
/// password.
pub(super) fn proxy_for(
    cluster: &Uri,
    named: Option<&str>,
    variable: impl Fn(&'static str) -> Option<String>,
) -> Result<Option<Uri>, String> {
    let named = named.filter(|url| !url.is_empty());
    let (source, url) = match named {
        Some(url) => ("proxy-url", url.to_owned()),
        None => {
            let host = cluster.host().unwrap_or_default().trim_matches(['[', ']']);
            let Some(url) = proxy_url(variable, host, cluster.port_u16().unwrap_or(443)) else {
                return Ok(None);
            };
            ("HTTPS_PROXY", url)
        }
    };
    let url = url.trim();
    let url = match url.split_once("://") {
        // The client lets the proxy resolve names in either case.
        Some(("socks5h", rest)) => format!("socks5://{rest}"),
        Some(_) => url.to_owned(),
        None => format!("http://{url}"),
    };
    let uri: Uri = url.parse().map_err(|_| format!("{source}: it is not a URL"))?;
    match uri.scheme_str() {
        Some("http" | "https" | "socks5") => Ok(Some(uri)),
        _ => Err(format!("{source}: the scheme must be http, https or socks5")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(cluster: &str, named: Option<&str>, env: &[(&str, &str)]) -> Result<String, String> {
        let proxy = proxy_for(&cluster.parse().unwrap(), named, |name| {
            let found = env.iter().find(|(variable, _)| *variable == name);
            found.map(|(_, value)| (*value).to_owned())
        })?;
        Ok(proxy.map_or_else(String::new, |uri| uri.to_string()))
    }

    #[test]
    fn the_proxy_of_a_kubeconfig_comes_before_that_of_the_environment() {
        let env = [("HTTPS_PROXY", "env.example:3128"), ("NO_PROXY", "10.0.0.0/8,.svc,,x:y")];
        let cluster = "https://192.0.2.1:6443";
        assert_eq!(found(cluster, None, &env).unwrap(), "http://env.example:3128/");
        assert_eq!(found(cluster, Some(""), &env).unwrap(), "http://env.example:3128/");
        assert_eq!(found(cluster, Some("http://a:1"), &env).unwrap(), "http://a:1/");
        let exempt = "https://10.0.0.1:6443";
        assert_eq!(found(exempt, None, &env).unwrap(), "");
        assert_eq!(found(exempt, Some("socks5h://a:1"), &env).unwrap(), "socks5://a:1/");
        assert_eq!(found("https://[::1]:6443", None, &env).unwrap(), "");
        assert_eq!(found(cluster, None, &[]).unwrap(), "");
    }

    #[test]
    fn a_proxy_that_cannot_be_used_is_named_by_its_source_and_not_quoted() {
        let cluster = "https://192.0.2.1:6443";
        for (named, env, source) in [
            (Some("ftp://user:secret@a"), &[][..], "proxy-url: "),
            (Some("http://user:secret@a b"), &[], "proxy-url: "),
            (None, &[("https_proxy", "ftp://user:secret@a")], "HTTPS_PROXY: "),
        ] {
            let fault = found(cluster, named, env).unwrap_err();
            assert!(fault.starts_with(source) && !fault.contains("secret"), "{fault}");
        }
    }
}
