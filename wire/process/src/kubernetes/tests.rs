use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use tokio::io::AsyncReadExt as _;

use super::*;

#[tokio::test]
async fn requests_go_through_the_proxy_of_the_kubeconfig() {
    for (scheme, begin) in
        [("http", &b"CONNECT 192.0.2.1:6443 HTTP/1.1\r\n"[..]), ("socks5", &[5, 1, 0])]
    {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = listener.local_addr().unwrap();
        let kubeconfig = tempfile::NamedTempFile::new().unwrap();
        let text = format!(
            r#"{{"apiVersion":"v1","kind":"Config","current-context":"x","clusters":[{{"name":"c",
            "cluster":{{"server":"https://192.0.2.1:6443","proxy-url":"{scheme}://{proxy}"}}}}],
            "contexts":[{{"name":"x","context":{{"cluster":"c","user":"u"}}}}],
            "users":[{{"name":"u","user":{{"token":"t"}}}}]}}"#
        );
        std::fs::write(kubeconfig.path(), text).unwrap();
        let kubeconfig = Some(kubeconfig.path().to_owned());
        let config = KubernetesConfig { kubeconfig, ..KubernetesConfig::default() };
        let (client, _) = config.client(&mut Files::default(), false).unwrap();
        let mut received = vec![0; begin.len()];
        tokio::select! {
            answer = client.apiserver_version() => panic!("{answer:?}"),
            () = async {
                let (mut socket, _) = listener.accept().await.unwrap();
                socket.read_exact(&mut received).await.unwrap();
            } => {}
        }
        assert_eq!(received, begin, "{scheme}");
    }
}

#[test]
fn a_kubeconfig_that_cannot_be_parsed_is_named_in_one_line() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "clusters: [\nusers: }").unwrap();
    let kubeconfig = Some(file.path().to_owned());
    let config = KubernetesConfig { kubeconfig, ..KubernetesConfig::default() };
    let error = config.config(&mut Files::default()).unwrap_err().to_string();
    let start = format!("{}: cannot be used as a kubeconfig: ", file.path().display());
    assert!(error.starts_with(&start) && !error.contains('\n'), "{error}");
}

#[test]
fn a_kubeconfig_with_data_that_are_no_certificate_is_refused() {
    let cluster =
        Cluster { certificate_authority_data: Some(BASE64.encode("x")), ..Cluster::default() };
    let error = authorities(&cluster, Path::new("k"), &mut Files::default()).unwrap_err();
    assert_eq!(error.to_string(), "k: certificate-authority-data holds no certificate");
}

#[test]
fn a_ca_file_without_a_certificate_is_refused() {
    let error = record_authorities(&mut Files::default(), Path::new("ca.crt"), b"").unwrap_err();
    assert_eq!(error.to_string(), "ca.crt: holds no certificate");
}

/// What a kubeconfig with this user makes of the file `token`.
fn token(user: &str, contents: &str) -> Result<String, String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("kubeconfig");
    std::fs::write(folder.path().join("token"), contents).unwrap();
    let text = format!(
        r#"{{"apiVersion":"v1","kind":"Config","current-context":"x",
        "clusters":[{{"name":"c","cluster":{{"server":"https://127.0.0.1:1"}}}}],
        "contexts":[{{"name":"x","context":{{"cluster":"c","user":"u"}}}}],
        "users":[{{"name":"u","user":{user}}}]}}"#
    );
    std::fs::write(&path, &text).unwrap();
    let config = KubernetesConfig { kubeconfig: Some(path), ..KubernetesConfig::default() };
    let mut files = Files::default();
    let user = match config.config(&mut files) {
        Ok(config) => config.auth_info,
        Err(error) => {
            return Err(error.to_string().replace(&folder.path().display().to_string(), "@"));
        }
    };
    assert_eq!(user.token_file, None, "the client itself would read it");
    std::fs::write(folder.path().join("token"), "another").unwrap();
    let is_of_file = !text.contains(r#""token":"#);
    assert_eq!(
        files.are_unchanged().unwrap(),
        !is_of_file,
        "a change of the token file is noticed"
    );
    Ok(user.token.unwrap().expose_secret().to_owned())
}

#[test]
fn a_token_has_no_white_space_around_it_and_its_file_is_one_of_the_kubeconfig() {
    let file = r#"{"tokenFile":"token"}"#;
    assert_eq!(token(file, " abc\n").unwrap(), "abc");
    assert_eq!(token(file, "\n").unwrap_err(), "@/token: holds no token");
    let unusable = "the token has characters that none may have";
    assert_eq!(token(file, "a\nb\n").unwrap_err(), format!("@/token: {unusable}"));
    assert_eq!(token(r#"{"token":"abc\n","tokenFile":"token"}"#, "").unwrap(), "abc");
    let two_lines = token(r#"{"token":"a\nb"}"#, "").unwrap_err();
    assert_eq!(two_lines, format!("@/kubeconfig: {unusable}"));
}

#[test]
fn a_client_key_without_line_breaks_is_not_quoted() {
    let secret = "MIGHAgEAMBMGByqGSM49";
    let key = format!("-----BEGIN PRIVATE KEY-----{secret}-----END PRIVATE KEY-----");
    let data = BASE64.encode(&key);
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("key"), &key).unwrap();
    let file = folder.path().join("key");
    let file = file.display();
    for user in [
        format!(r#"{{"client-key":"{file}","client-certificate":"{file}"}}"#),
        format!(r#"{{"client-key-data":"{data}","client-certificate":"{file}"}}"#),
    ] {
        let error = token(&user, "").unwrap_err();
        assert!(error.contains("line breaks are missing"), "{error}");
        assert!(!error.contains(secret), "{error}");
    }
}

#[test]
fn a_lease_ends_its_duration_after_its_last_renewal() {
    let at = |second| Timestamp::from_second(second).unwrap();
    let lease = |renewed: Option<i64>, acquired: Option<i64>, duration| LeaseSpec {
        renew_time: renewed.map(at).map(MicroTime),
        acquire_time: acquired.map(at).map(MicroTime),
        lease_duration_seconds: duration,
        ..LeaseSpec::default()
    };
    assert_eq!(lease_expiry(&lease(Some(100), Some(1), Some(30))), Some(at(130)));
    assert_eq!(lease_expiry(&lease(None, Some(1), Some(30))), Some(at(31)));
    assert_eq!(lease_expiry(&lease(None, None, Some(30))), None);
    assert_eq!(lease_expiry(&lease(Some(100), None, None)), None);
    assert_eq!(lease_expiry(&lease(Some(100), None, Some(-30))), Some(at(70)));
}
